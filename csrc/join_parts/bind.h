// What PyTorch calls as kvpress::join_parts: checks, allocation, the kernel.
#pragma once

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> join_parts(Tensor part, Tensor part_lse) {
  const char* op = "join_parts";
  Shapes shapes(op);
  shapes.bind(part, "out_JBNQE");
  shapes.bind(part_lse, "lse_JBNQ");
  expect(op, part, "out_JBNQE", ScalarType::Float, "float32");
  expect(op, part_lse, "lse_JBNQ", ScalarType::Float, "float32");
  shapes.at_most("E", kMostWidth);
  Tensor out = empty(op, {shapes['B'], shapes['N'], shapes['Q'], shapes['E']}, ScalarType::Float);
  Tensor lse = empty(op, {shapes['B'], shapes['N'], shapes['Q']}, ScalarType::Float);
  JoinParts a{static_cast<const float*>(part.data_ptr()),
              static_cast<const float*>(part_lse.data_ptr()),
              shapes['J'],
              lse.numel(),
              shapes['E'],
              static_cast<float*>(out.data_ptr()),
              static_cast<float*>(lse.data_ptr())};
  kernels().join_parts(a, threads());
  return {out, lse};
}

}  // namespace
}  // namespace kvpress
