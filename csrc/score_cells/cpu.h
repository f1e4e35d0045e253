// Bounds of products of queries with the keys of pages, by the cells that keys are in. Formula and slack: README.md.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tasks.h"
#include "products.h"

namespace kvpress::KERNEL_ISA {

// E: the storage of boxes.
template <class E>
class CellScores {
 public:
  static constexpr int64_t kPages = 8;  // of a task

  explicit CellScores(const ScoreCells& a)
      : a_(a), places_{a.of.width, a.slots, a.bits}, stride_(Layout::up(a.of.width, kWidth)) {
    const int64_t heads = a.of.row.rows * a.of.row.group;
    queries_ = scratch<float, struct CellQueries>(heads * stride_);
    sizes_ = scratch<float, struct CellSizes>(heads);
    for (int64_t n = 0; n < heads; n++) {
      float* to = queries_ + n * stride_;
      read_floats(a.of.query, a.of.query_type, n * a.of.width, a.of.width, 1.0f, to);
      std::fill(to + a.of.width, to + stride_, 0.0f);
      sizes_[n] = 0;
      for (int64_t d = 0; d < a.of.width; d++) sizes_[n] = std::max(sizes_[n], std::abs(to[d]));
    }
  }

  // What is given, for all places of a row; no place ranks yet.
  void begin(int64_t r) const {
    const int64_t count = a_.of.row.group * a_.of.row.table_width;
    std::copy_n(a_.loose + r * count, count, a_.of.bound + r * count);
    std::fill_n(a_.rank + r * count, count, -INFINITY);
  }

  // Some of the named places of a row.
  void run(int64_t r, int64_t begin) const {
    const RowPages& row = a_.of.row;
    const int32_t *place = a_.place + r * row.table_width, *table = row.table + r * row.table_width;
    const int64_t end = std::min(begin + kPages, a_.chosen[r]);
    for (int64_t i = begin; i < end; i++) {
      if (place[i] >= row.pages[r]) continue;  // of a row's pages alone the table has been checked
      const bool last = i + 1 >= end || place[i + 1] >= row.pages[r];
      const int64_t page = table[place[i]], next = last ? page : table[place[i + 1]];
      fetch_box(next);
      for (int64_t g = 0; g < row.group; g += kHeads)
        with_constant<kHeads>(std::min<int64_t>(kHeads, row.group - g), [&](auto M) {
          const int64_t head = r * row.group + g;
          a_.bits == 2 ? score<M(), 2>(head, page, place[i], next) : score<M(), 4>(head, page, place[i], next);
        });
    }
  }

 private:
  static constexpr int kHeads = 4;

  const uint8_t* cell(int64_t page) const { return a_.cell + page * a_.cell_bytes; }
  const E* box(int64_t page) const { return static_cast<const E*>(a_.of.box) + page * 2 * a_.of.width; }

  void fetch_box(int64_t page) const {
    const char* from = reinterpret_cast<const char*>(box(page));
    for (int64_t i = 0; i < 2 * a_.of.width * int64_t(sizeof(E)); i += kLine) __builtin_prefetch(from + i);
  }

  // Of M query heads from `head` on: Σ_d q_d · key_d ≤ least + unit · Σ_d whole_d · cell_d + rounded.
  template <int M, int Bits>
  __attribute__((noinline)) void score(int64_t head, int64_t page, int64_t w, int64_t next) const {
    alignas(64) int8_t whole[M][kMostCellFactors];
    float least[M], unit[M];
    int32_t most[M];
    fold<M, Bits>(queries_ + head * stride_, sizes_ + head, box(page), whole, least, unit);
    largest_products<M, Bits>(places_, cell(page), whole, most, cell(next));
    for (int m = 0; m < M; m++) {
      const int64_t at = (head + m) * a_.of.row.table_width + w;
      const float loose = a_.of.bound[at], fine = least[m] + unit[m] * float(most[m]);
      const float rounded = 0.51f * unit[m] * float(a_.of.width * ((1 << Bits) - 1));
      a_.rank[at] = fine < loose ? fine : loose;  // not what is no number
      a_.of.bound[at] = fine + rounded < loose ? fine + rounded : loose;
    }
  }

  template <int M, int Bits>
  void fold(const float* q, const float* size, const E* box, int8_t (*whole)[kMostCellFactors], float* least,
            float* unit) const {
    alignas(64) float factor[M][kMostCellFactors];
    Vec sums[M] = {}, largest[M] = {}, sizes{};
    const auto add = [&](int64_t d, Vec low, Vec high) __attribute__((always_inline)) {
      const Vec extent = high - low, cell = extent * (1.0f / (1 << Bits));
      sizes += max(magnitude(low), magnitude(high)) + extent + 0x1p-100f;  // infinite or none where an end is
      KVPRESS_UNROLLED (int m = 0; m < M; m++) {
        const Vec x = load(q + m * stride_ + d), part = x * cell;
        store(factor[m] + d, part);
        sums[m] += x * low + max(part, Vec{});
        largest[m] = max(magnitude(part), largest[m]);
      }
    };
    int64_t d = 0;
    for (; d + kWidth <= a_.of.width; d += kWidth) add(d, load(box + d), load(box + a_.of.width + d));
    if (d < a_.of.width) {
      E rest[2][kWidth] = {};
      for (int i = 0; i < 2; i++) std::copy(box + i * a_.of.width + d, box + (i + 1) * a_.of.width, rest[i]);
      add(d, load(rest[0]), load(rest[1]));
    }
    const float slack = 4 * float(a_.of.width) * 0x1p-24f * sum(sizes);
    for (int m = 0; m < M; m++) {
      // Factors too small to be told apart are none, and may be as large as the largest one instead.
      const float top = max(largest[m]), scale = top > 0x1p-100f ? kFactor / top : 0.0f;
      const float width = float(a_.of.width), none = top > 0x1p-100f ? 0.0f : width * float(1 << Bits) * top;
      unit[m] = scale > 0 ? top * (1.0f / kFactor) : 0.0f;
      least[m] = sum(sums[m]) + slack * size[m] + none + width * 0x1p-140f;
      alignas(64) int16_t wide[kMostCellFactors];
      for (d = 0; d < stride_; d += kWidth) to_whole(load(factor[m] + d) * scale, wide + d);
      for (d = 0; d < stride_; d++) whole[m][d] = int8_t(wide[d]);
    }
  }

  const ScoreCells& a_;
  const CellPlaces places_;
  const int64_t stride_;     // numbers from one query to the next
  float *queries_, *sizes_;  // and the largest number of each
};

inline void score_cells(const ScoreCells& a, const Threads& threads) {
  with_storage(a.of.type, [&](auto storage) {
    using Scores = CellScores<decltype(storage)>;
    const Scores scores(a);
    const RowPages& row = a.of.row;
    int64_t most = 0;
    for (int64_t r = 0; r < row.rows; r++) {
      scores.begin(r);
      most = std::max(most, a.chosen[r]);
    }
    const int64_t parts = (most + Scores::kPages - 1) / Scores::kPages;
    const bool worthwhile = row.rows * row.group * most * a.slots * a.of.width > 1 << 20;
    share(threads, row.rows * parts, worthwhile,
          [&](int64_t task) { scores.run(task / parts, task % parts * Scores::kPages); });
  });
}

}  // namespace kvpress::KERNEL_ISA
