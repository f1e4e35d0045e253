// What PyTorch calls as kvpress::attend_blocks: checks, allocation, the kernel.
#pragma once

#include "../include/bind_maps.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> attend_blocks(Tensor query, Tensor key, Tensor value, Tensor map, double scaling) {
  const char* op = "attend_blocks";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(value, "value_BHSE");
  const BlockMap blocks = map_of(op, shapes, std::optional<Tensor>(map));
  shapes.at_most("E", kMostWidth);
  const Strided queries(op, query, "query_BNQD"), keys(op, key, "key_BHSD"), values(op, value, "value_BHSE");
  Tensor out = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['Q'], shapes['E']});
  Tensor lse = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['Q']}, ScalarType::Float);
  AttendBlocks a{queries.heads, keys.heads,     values.heads,
                 shapes['B'],   shapes['H'],    shapes['N'] / shapes['H'],
                 shapes['D'],   shapes['E'],    logits_of(op, scaling, 0).scaling,
                 blocks,        out.data_ptr(), static_cast<float*>(lse.data_ptr())};
  kernels().attend_blocks(a, threads());
  return {out, lse};
}

}  // namespace
}  // namespace kvpress
