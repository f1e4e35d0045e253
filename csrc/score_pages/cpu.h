// Upper bounds of products of queries with the keys of pages.
#pragma once

#include "../include/tasks.h"
#include "boxes.h"

namespace kvpress::KERNEL_ISA {

// E: the storage of boxes.
template <class E>
class PageScores {
 public:
  static constexpr int64_t kPages = 64;  // of a task

  explicit PageScores(const ScorePages& a) : a_(a), bounds_(a.width) {
    queries_ = scratch<float, struct OrderedQueries>(a.row.rows * a.row.group * bounds_.stride());
    bounds_.order(a.query, a.query_type, a.row.rows * a.row.group, queries_);
  }

  // Some places of the table of a row.
  void run(int64_t r, int64_t begin) const {
    const RowPages& row = a_.row;
    const int64_t end = std::min(begin + kPages, row.table_width), held = std::min(end, row.pages[r]);
    const int32_t* table = row.table + r * row.table_width;
    float* bound = a_.bound + r * row.group * row.table_width;
    const float* query = queries_ + r * row.group * bounds_.stride();
    for (int64_t w = begin; w < held; w += 2) {
      const int64_t both[2] = {w, std::min(w + 1, held - 1)};  // the last one twice: all go the same way
      const E* const pair[2] = {box(table[both[0]]), box(table[both[1]])};
      for (int i = 0; i < 2; i++)
        if (both[i] + kAhead < held) bounds_.fetch(box(table[both[i] + kAhead]));
      bounds_.pair(query, row.group, pair, {bound + both[0], bound + both[1]}, row.table_width);
    }
    for (int64_t g = 0; g < row.group; g++, bound += row.table_width) {
      for (int64_t w = begin; w < held; w++) bound[w] = bound[w] == bound[w] ? bound[w] : INFINITY;
      std::fill(bound + std::max(begin, held), bound + end, -INFINITY);
    }
  }

 private:
  static constexpr int64_t kAhead = 4;  // pages: their boxes lie anywhere

  const E* box(int64_t page) const { return static_cast<const E*>(a_.box) + page * 2 * a_.width; }

  const ScorePages& a_;
  const BoxBounds<E> bounds_;
  float* queries_;
};

inline void score_pages(const ScorePages& a, const Threads& threads) {
  with_storage(a.type, [&](auto storage) {
    using Scores = PageScores<decltype(storage)>;
    const Scores scores(a);
    const int64_t parts = (a.row.table_width + Scores::kPages - 1) / Scores::kPages;
    const bool worthwhile = a.row.rows * a.row.group * a.row.table_width * a.width > 1 << 18;
    share(threads, a.row.rows * parts, worthwhile,
          [&](int64_t task) { scores.run(task / parts, task % parts * Scores::kPages); });
  });
}

}  // namespace kvpress::KERNEL_ISA
