// What PyTorch calls as kvpress::channel_scores: checks, allocation, the kernel.
#pragma once

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

Tensor channel_scores(Tensor query, Tensor key, Tensor held) {
  const char* op = "channel_scores";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(held, "held_BHS");
  if (held.scalar_type() != ScalarType::Bool) refuse(op, "held_BHS must be bool");
  shapes.at_least_one("BHNQD");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("S", kMostSlots);
  if (shapes['N'] % shapes['H']) refuse(op, shapes['N'], " query heads are no multiple of ", shapes['H'], " KV heads");
  const Strided queries(op, query, "query_BNQD"), keys(op, key, "key_BHSD");
  const Tensor holds = torch::stable::contiguous(held);
  Tensor scores = empty(op, {shapes['B'], shapes['H'], shapes['D']}, ScalarType::Float);
  ChannelScores a{queries.heads,
                  keys.heads,
                  static_cast<const bool*>(holds.data_ptr()),
                  shapes['B'],
                  shapes['H'],
                  shapes['N'] / shapes['H'],
                  shapes['Q'],
                  shapes['S'],
                  shapes['D'],
                  static_cast<float*>(scores.data_ptr())};
  kernels().channel_scores(a, threads());
  return scores;
}

}  // namespace
}  // namespace kvpress
