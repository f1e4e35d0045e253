// What PyTorch calls as kvpress::attend_sums: checks, allocation, the kernel.
#pragma once

#include "../include/bind_maps.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> attend_sums(Tensor query, Tensor key, Tensor value, Tensor position, double scaling,
                                       double softcap, std::string noise, double tau, int64_t seed, int64_t layer,
                                       int64_t first, std::optional<Tensor> map) {
  const char* op = "attend_sums";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(value, "value_BHSE");
  check_prompt(op, shapes);
  const Tensor positions = positions_of(op, shapes, position, false);
  shapes.at_least_one("E");
  shapes.at_most("E", kMostWidth);
  if (key.scalar_type() != query.scalar_type() || value.scalar_type() != query.scalar_type())
    refuse(op, "key_BHSD and value_BHSE must be of the dtype of query_BNQD");
  if (shapes['Q'] != shapes['S'])
    refuse(op, shapes['Q'], " queries for ", shapes['S'],
           " slots; a whole prompt has as many of both. Use attention_sums for a chunk");
  const Strided queries(op, query, "query_BNQD"), keys(op, key, "key_BHSD"), values(op, value, "value_BHSE");
  Tensor out = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['Q'], shapes['E']});
  Tensor sums = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['S']}, ScalarType::Float);
  AttentionSums a = sums_of(op, shapes, queries, keys, positions, sums, scaling, softcap,
                            noise_of(op, noise, tau, seed, layer, first));
  a.value = values.heads;
  a.value_width = shapes['E'];
  a.out = out.data_ptr();
  a.map = map_of(op, shapes, map, softcap);
  kernels().attention_sums(a, threads());
  return {out, sums};
}

}  // namespace
}  // namespace kvpress
