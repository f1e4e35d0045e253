// What PyTorch calls as kvpress::attention_sums: checks, allocation, the kernel.
#pragma once

#include "../include/bind_maps.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

Tensor attention_sums(Tensor query, Tensor key, Tensor position, double scaling, double softcap, int64_t window,
                      std::string noise, double tau, int64_t seed, int64_t layer, std::optional<Tensor> map) {
  const char* op = "attention_sums";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(key, "key_BHSD");
  check_prompt(op, shapes);
  const Tensor positions = positions_of(op, shapes, position, true);
  if (window < 0) refuse(op, "window is ", window, "; it must not be negative");
  const Strided queries(op, query, "query_BNQD"), keys(op, key, "key_BHSD");
  Tensor sums = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['S']}, ScalarType::Float);
  AttentionSums a =
      sums_of(op, shapes, queries, keys, positions, sums, scaling, softcap, noise_of(op, noise, tau, seed, layer));
  a.window = window;
  a.map = map_of(op, shapes, map, softcap);
  kernels().attention_sums(a, threads());
  return sums;
}

}  // namespace
}  // namespace kvpress
