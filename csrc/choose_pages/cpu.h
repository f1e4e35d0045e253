// Which pages of rows are read. How they rank: README.md.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

class PageChoice {
 public:
  explicit PageChoice(const ChoosePages& a) : a_(a), width_(a.row.table_width) {}

  void run(int64_t r) const {
    const int64_t held = a_.row.pages[r], padded = (held + kWidth - 1) / kWidth * kWidth;
    int32_t* place = a_.place + r * width_;
    auto* rank = scratch<float, struct PageRanks>(padded);
    auto* order = scratch<int32_t, struct PageOrder>(padded);
    find_ranks(r, held, rank);
    const int64_t always = find_order(r, held, padded, rank, order);
    const int64_t chosen = std::min(std::max(always, a_.keep[r]), held);
    a_.chosen[r] = chosen;
    if (chosen == held) {
      for (int64_t w = 0; w < held; w++) place[w] = int32_t(w);
    } else if (chosen > 0) {
      take(order, padded, chosen, place);
    }
    std::fill(place + chosen, place + width_, -1);
  }

 private:
  // Numbers of a row of bounds; −∞ beyond its pages, and ∞ for what is no number.
  static Vec bounds(const float* from, int64_t count) {
    const Vec x = load_some(from, count, -INFINITY);
    return x == x ? x : splat(INFINITY);
  }

  // The largest bound relative to the best of its query head: 0 for the best.
  void find_ranks(int64_t r, int64_t held, float* rank) const {
    for (int64_t g = 0; g < a_.row.group; g++) {
      const float* from = a_.bound + (r * a_.row.group + g) * width_;
      Vec most = splat(-INFINITY);
      for (int64_t w = 0; w < held; w += kWidth) most = max(bounds(from + w, held - w), most);
      const Vec best = splat(max(most));
      for (int64_t w = 0; w < held; w += kWidth) {
        const Vec x = bounds(from + w, held - w), relative = x == best ? Vec{} : x - best;
        store(rank + w, g ? max(relative, load(rank + w)) : relative);
      }
    }
  }

  // Whole numbers that grow as pages rank lower; −1 for what is always read, the largest of all beyond the pages.
  // Returns how many are always read.
  int64_t find_order(int64_t r, int64_t held, int64_t padded, const float* rank, int32_t* order) const {
    const int32_t* table = a_.row.table + r * width_;
    const int64_t sink = a_.sink[r], from = a_.from[r];
    for (int64_t w = 0; w < held; w += kWidth) {  // ranks are not above 0: their bits grow with their size
      const IntVec bits = bits_as<IntVec>(magnitude(load(rank + w)));
      std::memcpy(order + w, &bits, sizeof bits);
    }
    int64_t always = 0;
    for (int64_t w = 0; w < held; w++) {
      const int32_t* span = a_.span + int64_t(table[w]) * 2;
      const bool read = span[0] < sink || span[1] >= from;
      order[w] = read ? -1 : order[w];
      always += read;
    }
    std::fill(order + held, order + padded, INT32_MAX);
    return always;
  }

  static int64_t below(const int32_t* order, int64_t padded, int32_t limit) {
    IntVec count{};
    for (int64_t w = 0; w < padded; w += kWidth) count -= load(order + w) < limit;
    int64_t total = 0;
    for (int i = 0; i < kWidth; i++) total += count[i];
    return total;
  }

  // The places of the first `chosen` numbers in ascending order; of equal ones the first.
  static void take(const int32_t* order, int64_t padded, int64_t chosen, int32_t* place) {
    int32_t last = 0;  // the number at which the choice ends: bit by bit the largest with fewer below it
    for (int bit = 30; bit >= 0; bit--)
      if (below(order, padded, last | int32_t(1) << bit) < chosen) last |= int32_t(1) << bit;
    int64_t equal = chosen - below(order, padded, last);
    for (int64_t w = 0, n = 0; n < chosen; w++) {
      const bool ends = order[w] == last && equal > 0;
      equal -= ends;
      place[n] = int32_t(w);
      n += order[w] < last || ends;
    }
  }

  const ChoosePages& a_;
  const int64_t width_;
};

inline void choose_pages(const ChoosePages& a, const Threads& threads) {
  const PageChoice choice(a);
  const bool worthwhile = a.row.rows * a.row.table_width * (a.row.group + 30) > 1 << 16;
  share(threads, a.row.rows, worthwhile, [&](int64_t r) { choice.run(r); });
}

}  // namespace kvpress::KERNEL_ISA
