// Running softmaxes. A record: the largest logit, the sum of the exponentials relative to it, their sum times the values.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/tiles.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kOut = 2;  // where the values begin

inline void clear(float* records, int64_t count, int64_t size) {
  std::fill_n(records, count * size, 0.0f);
  for (int64_t m = 0; m < count; m++) records[m * size] = -INFINITY;
}

// Caps logits, and hides those from `visible` on.
inline void finish_logits(float* x, int64_t padded, int64_t visible, float cap) {
  for (int64_t i = 0; i < padded && cap != 0.0f; i += kWidth) store(x + i, capped(load(x + i), cap));
  for (int64_t i = std::max<int64_t>(0, visible); i < padded; i++) x[i] = -INFINITY;
}

// Turns logits into exponentials relative to the largest logit of the record so far.
inline void weigh(float* x, int64_t padded, float* record, int64_t size, Ahead& ahead) {
  Vec largest = load(x);
  for (int64_t i = kWidth; i < padded; i += kWidth) largest = max(load(x + i), largest);
  const float top = max(largest);
  if (top > record[0]) {
    const float shrink = std::exp(record[0] - top);
    for (int64_t d = 1; d < size; d++) record[d] *= shrink;
    record[0] = top;
  }
  if (record[0] == -INFINITY) {
    std::fill_n(x, padded, 0.0f);
    return;
  }
  Vec total{};
  ahead.fetch();
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Vec weight = exp(load(x + i) - record[0]);
    total += weight;
    store(x + i, weight);
  }
  record[1] += sum(total);
}

// The output of records at equal distances, and the LSE of what they saw.
inline float join_records(const float* records, int64_t count, int64_t distance, int64_t width, float* out) {
  float largest = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, records[i * distance]);
  std::fill_n(out, width, 0.0f);
  for (int64_t i = 0; i < count && largest != -INFINITY; i++) {
    const float* record = records + i * distance;
    const float share = std::exp(record[0] - largest);
    total += share * record[1];
    for (int64_t d = 0; d < width; d++) out[d] += share * record[kOut + d];
  }
  for (int64_t d = 0; d < width && total != 0; d++) out[d] /= total;
  return largest + std::log(total);
}

}  // namespace kvpress::KERNEL_ISA
