// What PyTorch calls as kvpress::match_keys: checks, allocation, the kernel.
#pragma once

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> match_keys(Tensor evicted, Tensor kept, Tensor allowed) {
  const char* op = "match_keys";
  Shapes shapes(op);
  shapes.bind(evicted, "evicted_BHVD");
  shapes.bind(kept, "kept_BHKD");
  shapes.bind(allowed, "allowed_BHK");
  shapes.at_least_one("D");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("VK", kMostSlots);
  const Strided evicted_keys(op, evicted, "evicted_BHVD"), kept_keys(op, kept, "kept_BHKD");
  if (kept.scalar_type() != evicted.scalar_type()) refuse(op, "kept_BHKD must be of the same dtype as evicted_BHVD");
  if (allowed.scalar_type() != ScalarType::Bool) refuse(op, "allowed_BHK must be bool");
  const Tensor targets_allowed = torch::stable::contiguous(allowed);
  const int64_t batch = shapes['B'], heads = shapes['H'], keys = shapes['V'];
  Tensor similarity = empty(op, {batch, heads, keys}, ScalarType::Float);
  Tensor target = empty(op, {batch, heads, keys}, ScalarType::Long);
  MatchKeys a{};
  a.evicted_key = evicted_keys.heads;
  a.kept_key = kept_keys.heads;
  a.allowed = static_cast<const bool*>(targets_allowed.data_ptr());
  a.batch = batch;
  a.heads = heads;
  a.evicted = keys;
  a.kept = shapes['K'];
  a.width = shapes['D'];
  a.similarity = static_cast<float*>(similarity.data_ptr());
  a.target = static_cast<int64_t*>(target.data_ptr());
  kernels().match_keys(a, threads());
  return {similarity, target};
}

}  // namespace
}  // namespace kvpress
