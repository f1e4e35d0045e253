// What PyTorch calls as kvpress::pack: checks, allocation, the kernel.
#pragma once

#include "../include/bind_old.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Checks what pack and unpack share.
PackPages pages_to_pack(const char* op, const Tensor& key_channels, const Tensor& value_channels,
                        const std::vector<int64_t>& layout, int64_t pages, Type type) {
  if (layout.size() != kLayoutSizes) refuse(op, "layout has ", layout.size(), " sizes, not ", kLayoutSizes);
  PackPages a{};
  a.layout = layout_of(op, layout.data());
  a.type = type;
  if (a.layout.item_bytes != (type == Type::kFloat32 ? 4 : 2))
    refuse(op, "layout of numbers of ", a.layout.item_bytes, " bytes for another dtype");
  a.key_channel = channels_of(op, key_channels, pages, a.layout.key_kept, a.layout.key_width);
  a.value_channel = channels_of(op, value_channels, pages, a.layout.value_kept, a.layout.value_width);
  a.pages = pages;
  return a;
}

Tensor pack(Tensor key, Tensor value, Tensor key_channels, Tensor value_channels, std::vector<int64_t> layout) {
  const char* op = "pack";
  Shapes shapes(op);
  shapes.bind(key, "key_PSD");
  shapes.bind(value, "value_PSE");
  expect(op, key, "key_PSD", key.scalar_type(), "");
  expect(op, value, "value_PSE", key.scalar_type(), "of the dtype of key_PSD");
  PackPages a = pages_to_pack(op, key_channels, value_channels, layout, shapes['P'], type_of(op, key, "key_PSD"));
  if (a.layout.key_kept > a.layout.key_width)
    refuse(op, "the two codes of a channel are packed as channels of their own");
  if (shapes['S'] != a.layout.slots || shapes['D'] != a.layout.key_width || shapes['E'] != a.layout.value_width)
    refuse(op, "key_PSD ", shape_of(key), " and value_PSE ", shape_of(value), " do not fit the layout");
  Tensor page = empty(op, {a.pages, a.layout.page_bytes}, ScalarType::Byte);
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.page = static_cast<uint8_t*>(page.data_ptr());
  kernels().pack_pages(a, threads());
  return page;
}

}  // namespace
}  // namespace kvpress
