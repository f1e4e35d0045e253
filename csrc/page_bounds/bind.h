// What PyTorch calls as kvpress::page_bounds: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"
#include "../unpack/bind.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor, Tensor> page_bounds(Tensor page, Tensor key_channels, Tensor value_channels,
                                               std::vector<int64_t> layout, Tensor like, int64_t bits) {
  const char* op = "page_bounds";
  PageBounds a{packed_pages(op, page, key_channels, value_channels, layout, like), nullptr, nullptr, bits, 0, nullptr};
  const Layout& l = a.packed.layout;
  if (l.key_kept > l.key_width) refuse(op, "a channel with two codes has no bounds");
  if (bits) a.cell_bytes = cell_bytes_of(op, l.key_width, l.slots, bits);
  Tensor box = empty(op, {a.packed.pages, 2, l.key_width}, like.scalar_type());
  Tensor length = empty(op, {a.packed.pages, 2}, ScalarType::Float);
  Tensor cell = empty(op, {a.packed.pages, a.cell_bytes}, ScalarType::Byte);
  a.box = box.data_ptr();
  a.length = static_cast<float*>(length.data_ptr());
  a.cell = static_cast<uint8_t*>(cell.data_ptr());
  kernels().page_bounds(a, threads());
  return {box, length, cell};
}

}  // namespace
}  // namespace kvpress
