// Nodes of the tree of a row, and a heap of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/simd.h"
#include "args.h"

namespace kvpress::KERNEL_ISA {

struct TreeNode {
  int level;
  int64_t index;
  int64_t place() const { return index << level; }  // the first of it
};

// Nodes of a heap as numbers: the rank, inner nodes before pages, then the smaller place; and the level.
class NodeHeap {
 public:
  explicit NodeHeap(uint64_t* keys) : keys_(keys) {}

  void add(float rank, TreeNode node) { keys_[count_++] = key(rank, node); }  // before `order`
  void order() { std::make_heap(keys_, keys_ + count_); }
  void push(float rank, TreeNode node) {
    add(rank, node);
    std::push_heap(keys_, keys_ + count_);
  }
  TreeNode pop() {
    std::pop_heap(keys_, keys_ + count_);
    const uint64_t top = keys_[--count_];
    const int level = top & 7;
    return {level, (int64_t(~top >> 3) & PageTree::kMostPlaces) >> level};
  }
  bool empty() const { return !count_; }

 private:
  static uint64_t key(float rank, TreeNode node) {
    const auto bits = bits_as<uint32_t>(rank + 0.0f);  // of one zero
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    const uint64_t place = ~uint64_t(node.place()) & PageTree::kMostPlaces;
    return uint64_t{ordered} << 32 | uint64_t{node.level > 0} << 31 | place << 3 | uint64_t(node.level);
  }

  uint64_t* keys_;
  int64_t count_ = 0;
};

}  // namespace kvpress::KERNEL_ISA
