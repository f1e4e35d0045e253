// What PyTorch calls as kvpress::page_bounds: checks, allocation, the kernel.
#pragma once

#include "../include/dispatch.h"
#include "../include/retrieval.h"
#include "../unpack/bind.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> page_bounds(Tensor page, Tensor key_channels, Tensor value_channels,
                                       std::vector<int64_t> layout, Tensor like) {
  const char* op = "page_bounds";
  PageBounds a{packed_pages(op, page, key_channels, value_channels, layout, like), nullptr, nullptr};
  Tensor box = empty(op, {a.packed.pages, 2, a.packed.layout.key_width}, like.scalar_type());
  Tensor length = empty(op, {a.packed.pages, 2}, ScalarType::Float);
  a.box = box.data_ptr();
  a.length = static_cast<float*>(length.data_ptr());
  kernels().page_bounds(a, threads());
  return {box, length};
}

}  // namespace
}  // namespace kvpress
