// What the binding hands to the search.
#pragma once

#include "../include/retrieval.h"

namespace kvpress {

// The tree over the places of a page table: see kvpress/formulas/page_tree.py. Level 0 are pages.
struct PageTree {
  static constexpr int kMostLevel = 6, kMergeSteps = 8;
  static constexpr int64_t kMostPlaces = (int64_t{1} << 28) - 1;
  int64_t size[kMostLevel + 1], begin[kMostLevel + 2];  // of each level: its nodes, and the first of them
  int top = 0;                                          // the level of the roots

  explicit PageTree(int64_t places) : size{places}, begin{0, places} {
    for (; size[top] > 1 && top < kMostLevel; top++) {
      size[top + 1] = (size[top] + 1) / 2;
      begin[top + 2] = begin[top + 1] + size[top + 1];
    }
  }
  int64_t nodes() const { return begin[top + 1]; }  // pages included
};

struct SearchPages {
  ScorePages score;    // all of it
  ChoosePages choose;  // but for the bounds
  const void* tree;    // [R, X, 2, D], of the type of boxes
  int8_t* state;       // [R, X]
  int64_t* boxes;      // [R]
};

}  // namespace kvpress
