// The weight of every slot, from the exponentials of its block and the LSE of its row.
#pragma once

#include "regions.h"

namespace kvpress::KERNEL_ISA {

// Exponentials of all slots, each block relative to a logit of its own, until the row's LSE is known.
struct BlockWeights {
  float* weights;    // [R, M, stride]
  float* reference;  // [R, M, blocks]: the logit, later the factor that makes exponentials weights
  int64_t m, stride, blocks;

  float* row(int64_t r, int64_t query) const { return weights + (r * m + query) * stride; }
  float* references(int64_t r, int64_t query) const { return reference + (r * m + query) * blocks; }

  void keep(int64_t r, int64_t query, int64_t begin, int64_t slots, const float* x, float relative_to) const {
    std::copy_n(x, slots, row(r, query) + begin);
    references(r, query)[begin / kBlock] = relative_to;
  }

  // References become factors: exp(reference − lse).
  void normalise(int64_t r, int64_t query, const Regions& regions, float lse) const {
    for (int p = 0; p <= regions.a.parts; p++) normalise(r, query, regions.begin[p], regions.count(r, p), lse);
  }
  // Those of some slots, from a multiple of kBlock on.
  void normalise(int64_t r, int64_t query, int64_t begin, int64_t slots, float lse) const {
    float* factor = references(r, query) + begin / kBlock;
    for (int64_t k = 0; k * kBlock < slots; k++) factor[k] = lse == -INFINITY ? 0.0f : std::exp(factor[k] - lse);
  }

  // Exponentials of some slots become weights, once references are factors.
  void weigh(int64_t r, int64_t query, int64_t begin, int64_t end) const {
    for (int64_t s = begin; s < end; s++) row(r, query)[s] *= references(r, query)[s / kBlock];
  }

  // Slots from a row's count on weigh nothing.
  void clear_rest(int64_t r, int64_t query, const Regions& regions) const {
    for (int p = 0; p <= regions.a.parts; p++)
      std::fill(row(r, query) + regions.begin[p] + regions.count(r, p),
                row(r, query) + (p < regions.a.parts ? regions.begin[p + 1] : stride), 0.0f);
  }
};

// The weights that decode_rows returns; slots beyond a row's count weigh nothing.
struct Weights {
  static constexpr bool kJoins = true;
  BlockWeights kept;  // without memory where no weights are wanted
  void before_last_chunk(int64_t) {}
  void on_logits(int64_t, int64_t, int, int64_t, int64_t, const float*, Ahead&) {}
  void on_weights(int64_t r, int64_t m, int64_t begin, int64_t slots, const float* x, float relative_to) {
    if (kept.weights) kept.keep(r, m, begin, slots, x, relative_to);
  }
  void after_row(int64_t r, const Regions& regions, const float* lse) {
    for (int64_t m = 0; m < kept.m && kept.weights; m++) {
      kept.normalise(r, m, regions, lse[m]);
      for (int p = 0; p <= regions.a.parts; p++)
        kept.weigh(r, m, regions.begin[p], regions.begin[p] + regions.count(r, p));
      kept.clear_rest(r, m, regions);
    }
  }
};

}  // namespace kvpress::KERNEL_ISA
