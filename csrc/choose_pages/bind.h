// What PyTorch calls as kvpress::choose_pages: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> choose_pages(const Tensor& bound, const Tensor& table, const Tensor& pages,
                                        const Tensor& span, const Tensor& sink, const Tensor& from,
                                        const Tensor& keep) {
  const char* op = "choose_pages";
  Shapes shapes(op);
  shapes.bind(bound, "bound_BNW");
  bind_two(op, shapes, span, "span_PX", "span_P2");
  shapes.bind(sink, "sink_R");
  shapes.bind(from, "from_R");
  shapes.bind(keep, "keep_R");
  expect(op, bound, "bound_BNW", ScalarType::Float, "float32");
  expect(op, span, "span_P2", ScalarType::Int, "int32");
  for (const Tensor* each : {&sink, &from, &keep})
    expect(op, *each, "sink_R, from_R and keep_R", ScalarType::Long, "int64");
  const auto longs = [](const Tensor& each) { return static_cast<const int64_t*>(each.data_ptr()); };
  ChoosePages a{row_pages_of(op, shapes, table, pages),
                static_cast<const float*>(bound.data_ptr()),
                static_cast<const int32_t*>(span.data_ptr()),
                longs(sink),
                longs(from),
                longs(keep),
                nullptr,
                nullptr};
  Tensor place = empty(op, {shapes['R'], shapes['W']}, ScalarType::Int);
  Tensor chosen = empty(op, {shapes['R']}, ScalarType::Long);
  a.place = static_cast<int32_t*>(place.data_ptr());
  a.chosen = static_cast<int64_t*>(chosen.data_ptr());
  kernels().choose_pages(a, threads());
  return {place, chosen};
}

}  // namespace
}  // namespace kvpress
