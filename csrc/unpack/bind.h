// What PyTorch calls as kvpress::unpack: checks, allocation, the kernel.
#pragma once

#include "../include/dispatch.h"
#include "../pack/bind.h"

namespace kvpress {
namespace {

// Checks what unpack and page_bounds share.
PackPages packed_pages(const char* op, const Tensor& page, const Tensor& key_channels, const Tensor& value_channels,
                       const std::vector<int64_t>& layout, const Tensor& like) {
  Shapes shapes(op);
  shapes.bind(page, "page_PX");
  expect(op, page, "page_PX", ScalarType::Byte, "uint8");
  check_defined(op, like, "like");
  PackPages a = pages_to_pack(op, key_channels, value_channels, layout, shapes['P'], type_of(op, like, "like"));
  if (shapes['X'] != a.layout.page_bytes)
    refuse(op, "page_PX has ", shapes['X'], " bytes, the layout ", a.layout.page_bytes);
  if (reinterpret_cast<uintptr_t>(page.data_ptr()) % uintptr_t(a.layout.item_bytes))
    refuse(op, "page_PX begins between numbers of ", a.layout.item_bytes, " bytes; copy it");
  a.page = static_cast<uint8_t*>(page.data_ptr());
  a.unpack = true;
  return a;
}

std::tuple<Tensor, Tensor> unpack(Tensor page, Tensor key_channels, Tensor value_channels, std::vector<int64_t> layout,
                                  Tensor like) {
  const char* op = "unpack";
  PackPages a = packed_pages(op, page, key_channels, value_channels, layout, like);
  Tensor key = empty(op, {a.pages, a.layout.slots, a.layout.key_width}, like.scalar_type());
  Tensor value = empty(op, {a.pages, a.layout.slots, a.layout.value_width}, like.scalar_type());
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  kernels().pack_pages(a, threads());
  return {key, value};
}

}  // namespace
}  // namespace kvpress
