// What PyTorch calls as kvpress::attention_sums: checks, allocation, the kernel.
#pragma once

#include "../include/bind_maps.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Weights are checked here, so that the largest of none is 0.
Reduction reduction_of(const char* op, Shapes& shapes, int64_t window, bool largest,
                       const std::optional<Tensor>& weight, const Noise& noise) {
  if (window < 0) refuse(op, "window is ", window, "; it must not be negative");
  if (largest && (noise.kind != NoiseKind::kNone || noise.tau != 1.0))
    refuse(op, "noise or tau=", noise.tau, " with the largest weights; they are those without noise, tau=1");
  if (!weight) return {window, largest, nullptr};
  shapes.bind(*weight, "weight_BQ");
  expect(op, *weight, "weight_BQ", ScalarType::Float, "float32");
  const auto* at = static_cast<const float*>(weight->data_ptr());
  for (int64_t i = 0; i < weight->numel(); i++)
    if (!(at[i] >= 0 && at[i] < INFINITY))
      refuse(op, "weight_BQ holds ", at[i], "; finite numbers from 0 on are allowed");
  return {window, largest, at};
}

Tensor attention_sums(Tensor query, Tensor key, Tensor position, double scaling, double softcap, int64_t window,
                      bool largest, std::optional<Tensor> weight, std::string noise, double tau, int64_t seed,
                      int64_t layer, int64_t first, std::optional<Tensor> map) {
  const char* op = "attention_sums";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(key, "key_BHSD");
  check_prompt(op, shapes);
  const Tensor positions = positions_of(op, shapes, position, true);
  const Strided queries(op, query, "query_BNQD"), keys(op, key, "key_BHSD");
  Tensor sums = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['S']}, ScalarType::Float);
  AttentionSums a = sums_of(op, shapes, queries, keys, positions, sums, scaling, softcap,
                            noise_of(op, noise, tau, seed, layer, first));
  a.reduction = reduction_of(op, shapes, window, largest, weight, a.noise);
  a.map = map_of(op, shapes, map, softcap);
  kernels().attention_sums(a, threads());
  return sums;
}

}  // namespace
}  // namespace kvpress
