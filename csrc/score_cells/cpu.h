// Bounds of products of queries with the keys of pages, by the cells that keys are in. Formula and slack: README.md.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../include/codes.h"
#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

// E: the storage of boxes.
template <class E>
class CellScores {
 public:
  static constexpr int64_t kPages = 8;  // of a task

  explicit CellScores(const ScoreCells& a) : a_(a), stride_(Layout::up(a.of.width, kWidth)) {
    const int64_t heads = a.of.row.rows * a.of.row.group;
    queries_ = scratch<float, struct CellQueries>(heads * stride_);
    for (int64_t n = 0; n < heads; n++) {
      float* to = queries_ + n * stride_;
      read_floats(a.of.query, a.of.query_type, n * a.of.width, a.of.width, 1.0f, to);
      std::fill(to + a.of.width, to + stride_, 0.0f);
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
      if (i + 1 < end) fetch(table[place[i + 1]]);
      for (int64_t g = 0; g < row.group; g += kHeads)
        with_constant<kHeads>(std::min<int64_t>(kHeads, row.group - g), [&](auto M) {
          with_bits(a_.bits, [&](auto bits) {
            if constexpr (bits() < 8) score<M(), bits()>(r * row.group + g, table[place[i]], place[i]);
          });
        });
    }
  }

 private:
  static constexpr int kHeads = 4;
  static constexpr int64_t kSlots = 64;  // at a time

  // The next page, which lies anywhere.
  void fetch(int64_t page) const {
    const uint8_t* from = a_.cell + page * a_.cell_bytes;
    for (int64_t i = 0; i < a_.cell_bytes; i += kLine) __builtin_prefetch(from + i);
  }

  // Of M query heads from `head` on: Σ_d q_d · key_d ≤ least + unit · Σ_d whole_d · cell_d.
  template <int M, int Bits>
  __attribute__((noinline)) void score(int64_t head, int64_t page, int64_t w) const {
    alignas(64) int16_t whole[M][kMostFactors];
    float least[M], unit[M], most[M];
    fold<M, Bits>(queries_ + head * stride_, static_cast<const E*>(a_.of.box) + page * 2 * a_.of.width, whole, least,
                  unit);
    std::fill_n(most, M, -INFINITY);
    Ahead ahead;
    for (int64_t s = 0; s < a_.slots; s += kSlots) {
      alignas(64) float x[M][kSlots] = {};
      const int64_t take = std::min(kSlots, a_.slots - s);
      add_all_products<M, Bits>(a_.cell + page * a_.cell_bytes, s / kLines, take / kLines, a_.slots / kLines,
                                (a_.of.width + 1) / 2, whole[0], kMostFactors, unit, x[0], kSlots, ahead);
      for (int m = 0; m < M; m++) most[m] = std::max(most[m], *std::max_element(x[m], x[m] + take));
    }
    for (int m = 0; m < M; m++) {
      const int64_t at = (head + m) * a_.of.row.table_width + w;
      const float fine = least[m] + most[m];
      if (fine < a_.of.bound[at]) a_.of.bound[at] = fine;  // not what is no number
      a_.rank[at] = a_.of.bound[at];
    }
  }

  template <int M, int Bits>
  void fold(const float* q, const E* box, int16_t (*whole)[kMostFactors], float* least, float* unit) const {
    alignas(64) float factor[M][kMostFactors];
    Vec sums[M] = {}, sizes[M] = {}, largest[M] = {};
    const auto add = [&](int64_t d, Vec low, Vec high) __attribute__((always_inline)) {
      const Vec extent = high - low, cell = extent * (1.0f / (1 << Bits));
      const Vec size = max(magnitude(low), magnitude(high)) + extent + 0x1p-100f;
      KVPRESS_UNROLLED (int m = 0; m < M; m++) {
        const Vec x = load(q + m * stride_ + d), part = x * cell;
        store(factor[m] + d, part);
        sums[m] += x * low + max(part, Vec{});
        sizes[m] += magnitude(x) * size;  // infinite or none where a box or a query is
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
    const float width = float(a_.of.width), levels = float((1 << Bits) - 1);
    for (int m = 0; m < M; m++) {
      const float top = max(largest[m]), scale = top > 0 ? 32767.0f / top : 0.0f;
      unit[m] = top * (1 / 32767.0f);
      // Rounding in fp32, and of factors to 16 bits.
      least[m] = sum(sums[m]) + 4 * width * 0x1p-24f * sum(sizes[m]) + 0.51f * unit[m] * width * levels;
      for (d = 0; d < stride_; d += kWidth) to_whole(load(factor[m] + d) * scale, whole[m] + d);
    }
  }

  const ScoreCells& a_;
  const int64_t stride_;  // numbers from one query to the next
  float* queries_;
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
