// Outputs of parts, joined by their LSEs. Formula: README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

class JoinedParts {
 public:
  explicit JoinedParts(const JoinParts& a) : a_(a) {}

  // As many items as a vector has numbers, or the rest: every one by itself, its parts in order.
  void run(int64_t first) const {
    const int64_t count = std::min<int64_t>(kWidth, a_.items - first);
    Vec top = splat(-INFINITY), total{};
    for (int64_t j = 0; j < a_.parts; j++) top = max(top, sums(j, first, count));
    const Vec finite = top == -INFINITY ? Vec{} : top;  // -inf − -inf is no number
    float* weights = scratch<float, struct PartWeights>(a_.parts * kWidth);
    for (int64_t j = 0; j < a_.parts; j++) {
      const Vec weight = exp(sums(j, first, count) - finite);
      store(weights + j * kWidth, weight);
      total += weight;
    }
    for (int64_t i = 0; i < count; i++) {
      const float whole = total[i] == 0 ? 1.0f : total[i];
      join(weights + i, first + i, whole);
      a_.lse[first + i] = top[i] + std::log(whole);
    }
  }

 private:
  Vec sums(int64_t part, int64_t first, int64_t count) const {
    return load_some(a_.part_lse + part * a_.items + first, count, -INFINITY);
  }

  void join(const float* weight, int64_t item, float whole) const {
    constexpr int kMost = 8;  // vectors that stay in registers while the parts go by
    const float* part = a_.part + item * a_.width;
    float* out = a_.out + item * a_.width;
    int64_t e = 0;
    for (; e + kMost * kWidth <= a_.width; e += kMost * kWidth) add<Vec, kMost>(weight, part + e, whole, out + e);
    for (; e + kWidth <= a_.width; e += kWidth) add<Vec, 1>(weight, part + e, whole, out + e);
    for (; e < a_.width; e++) add<float, 1>(weight, part + e, whole, out + e);
  }

  // What has no weight may be no number.
  template <class Number, int N>
  void add(const float* weight, const float* part, float whole, float* out) const {
    constexpr int64_t kStep = sizeof(Number) / sizeof(float);
    Number sum[N]{}, x;
    for (int64_t j = 0; j < a_.parts; j++, weight += kWidth, part += a_.items * a_.width) {
      if (*weight == 0) continue;
      for (int n = 0; n < N; n++) {
        std::memcpy(&x, part + n * kStep, sizeof x);
        sum[n] += *weight * x;
      }
    }
    for (int n = 0; n < N; n++) {
      x = sum[n] / whole;
      std::memcpy(out + n * kStep, &x, sizeof x);
    }
  }

  const JoinParts& a_;
};

inline void join_parts(const JoinParts& a, const Threads& threads) {
  const JoinedParts joined(a);
  const bool worthwhile = a.parts * a.items * a.width > 1 << 18;
  share(threads, (a.items + kWidth - 1) / kWidth, worthwhile, [&](int64_t task) { joined.run(task * kWidth); });
}

}  // namespace kvpress::KERNEL_ISA
