// Queries as the products of attention take them.
#pragma once

#include "../include/storage.h"
#include "../include/tasks.h"
#include "../include/tiles.h"
#include "regions.h"

namespace kvpress::KERNEL_ISA {

// Queries of a row, times the scaling, as the products of attention take them; for regions in which it has slots.
class Queries {
 public:
  Queries(const DecodeRows& a, const Regions& regions) : a_(a), m_(a.group * a.queries), width_(a.pages.key_width) {
    const int64_t rows = a.batch * a.heads;
    all_ = scratch<float, struct AllQueries>(rows * m_ * width_);
    if (a.parts) kept_ = scratch<float, struct KeptQueries>(rows * a.parts * m_ * kKept);
    for (int64_t r = 0; r < rows; r++) {
      for (int p = 0; p < a.parts; p++)
        if (regions.count(r, p)) read_kept(r, p);
      if (regions.count(r, a.parts)) read_all(r);
    }
  }

  // All channels of query m of a row and those after it.
  const float* all(int64_t r, int64_t m) const { return all_ + (r * m_ + m) * width_; }

  // The channels that a part of old slots keeps, kKept numbers apart.
  float* kept(int64_t r, int p, int64_t m) const { return kept_ + ((r * a_.parts + p) * m_ + m) * kKept; }

  static constexpr int64_t kKept = 256;  // as many as an old key may have

 private:
  // Query m = g·Q + q of row r = b·H + h stands at [b, h·G + g, q], which is [r, m] where that is contiguous.
  void read(int64_t r, int64_t m, float* to) const {
    const int64_t head = r % a_.heads * a_.group + m / a_.queries;
    const int64_t offset =
        r / a_.heads * a_.query.batch_stride + head * a_.query.head_stride + m % a_.queries * a_.query.token_stride;
    read_floats(a_.query.data, a_.query.type, offset, width_, float(a_.logits.scaling), to);
  }

  void read_all(int64_t r) {
    float* row = scratch<float, struct QueryRow>(width_);
    pack_queries(m_, width_, row, all_ + r * m_ * width_, [&](int64_t m, float* to) { read(r, m, to); });
  }

  // As logits_of_tile takes them where the part's keys are not quantised.
  void read_kept(int64_t r, int p) {
    const Part& part = a_.part[p];
    const int16_t* channel = part.key_channel + r * part.layout.key_kept;
    float* row = scratch<float, struct QueryRow>(width_);
    const auto read_one = [&](int64_t m, float* to) {
      if (part.layout.key_kept == width_) return read(r, m, to);  // channels ascend: these are all
      read(r, m, row);
      for (int64_t c = 0; c < part.layout.key_kept; c++) to[c] = row[channel[c]];
    };
    if (part.layout.key_bits == 16) {
      alignas(64) float packed[kKept];
      pack_queries(m_, part.layout.key_kept, packed, kept(r, p, 0), read_one);
    } else {
      for (int64_t m = 0; m < m_; m++) read_one(m, kept(r, p, m));
    }
  }

  const DecodeRows& a_;
  int64_t m_, width_;
  float *all_, *kept_ = nullptr;
};

}  // namespace kvpress::KERNEL_ISA
