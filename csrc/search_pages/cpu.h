// The pages with the best bounds, by a best-first search in a tree of boxes. Rules and numerics: README.md.
//
// A row is a task: its result depends on nothing else. All memory is a thread's own and is reused.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/tasks.h"
#include "../score_pages/boxes.h"
#include "args.h"
#include "heap.h"

namespace kvpress::KERNEL_ISA {

// One step in the tree of one row.
template <class E>
class TreeSearch {
 public:
  TreeSearch(const SearchPages& a, const PageTree& tree, int64_t row)
      : a_(a), tree_(tree), row_(row), places_(a.score.row.table_width), pages_(a.score.row.pages[row]),
        group_(a.score.row.group), width_(a.score.width), table_(a.score.row.table + row * places_),
        tree_box_(static_cast<const E*>(a.tree) + row * (tree.nodes() - places_) * 2 * width_),
        state_(a.state + row * (tree.nodes() - places_)), bounds_(width_),
        query_(scratch<float, struct SearchQueries>(group_ * bounds_.stride())),
        score_(scratch<float, struct SearchScores>(tree.nodes() * group_)),
        best_(scratch<float, struct SearchBest>(group_)), evaluated_(scratch<bool, struct SearchSeen>(tree.nodes())),
        chosen_(scratch<bool, struct SearchChosen>(places_)),
        reached_(scratch<TreeNode, struct SearchReached>(tree.nodes())),
        keys_(scratch<uint64_t, struct SearchKeys>(tree.nodes())) {
    std::fill_n(evaluated_, tree.nodes(), false);
    bounds_.order(static_cast<const char*>(a.score.query) +
                      row * group_ * width_ * (a.score.query_type == Type::kFloat32 ? 4 : 2),
                  a.score.query_type, group_, query_);
  }

  void run() {
    for (int64_t i = 0; i < counted(tree_.top); i++) open({tree_.top, i});
    evaluate();
    const int64_t always = include(), wanted = std::min(std::max(always, a_.choose.keep[row_]), pages_);
    if (wanted == pages_) {
      std::fill_n(chosen_, pages_, true);
    } else if (wanted > always) {
      for (int64_t g = 0; g < group_; g++) best_[g] = best(g);
      choose(wanted - always);
    }
    settle();
    int32_t *begin = a_.choose.place + row_ * places_, *place = begin;
    for (int64_t w = 0; w < pages_; w++)
      if (chosen_[w]) *place++ = int32_t(w);
    std::fill(place, begin + places_, -1);
    a_.choose.chosen[row_] = wanted;
    a_.boxes[row_] = boxes_;
  }

 private:
  static constexpr int8_t kNow = PageTree::kMergeSteps;  // of a node that is expanded in this step, until it ends

  // How many nodes of a level cover pages of the row.
  int64_t counted(int level) const { return (pages_ + (int64_t{1} << level) - 1) >> level; }

  int8_t& state(TreeNode v) const { return state_[tree_.begin[v.level] + v.index - places_]; }
  bool expanded(TreeNode v) const { return v.level && state(v) >= 0; }

  template <class F>
  void each_child(TreeNode v, const F& f) const {
    const int64_t end = std::min(2 * v.index + 2, counted(v.level - 1));
    for (int64_t i = 2 * v.index; i < end; i++) f(TreeNode{v.level - 1, i});
  }

  // The number of a node's box, pages first. A node with one child has the box of its child.
  int64_t number(TreeNode v) const {
    while (v.level && (2 * v.index + 1) << (v.level - 1) >= pages_) v = {v.level - 1, 2 * v.index};
    return tree_.begin[v.level] + v.index;
  }
  const E* box(int64_t number) const {
    return number < places_ ? static_cast<const E*>(a_.score.box) + int64_t(table_[number]) * 2 * width_
                            : tree_box_ + (number - places_) * 2 * width_;
  }
  const float* score(TreeNode v) const { return score_ + number(v) * group_; }

  // Computes the bounds of the nodes that were reached since the last time, two boxes at once and no box twice.
  void evaluate() {
    int64_t two[2], waiting = 0;
    for (; scored_ < count_; scored_++) {
      if (scored_ + kAhead < count_) bounds_.fetch(box(number(reached_[scored_ + kAhead])));
      const int64_t next = number(reached_[scored_]);
      if (evaluated_[next]) continue;
      evaluated_[next] = true;
      boxes_++;
      two[waiting++] = next;
      if (waiting == 2) evaluate(two[0], two[1]), waiting = 0;
    }
    if (waiting) evaluate(two[0], two[0]);
  }

  void evaluate(int64_t one, int64_t other) {
    float* const bound[2] = {score_ + one * group_, score_ + other * group_};
    bounds_.pair(query_, group_, {box(one), box(other)}, bound, 1);
    for (float* each : bound)
      for (int64_t g = 0; g < group_; g++) each[g] = each[g] == each[g] ? each[g] : INFINITY;
  }

  // The frontier at the beginning of the step, at and below a node.
  void open(TreeNode v) {
    if (!expanded(v)) {
      reached_[count_++] = v;
      return;
    }
    state(v) = std::min(state(v), int8_t(kNow - 1));
    each_child(v, [&](TreeNode child) { open(child); });
  }

  // Calls f(child) for the children of a node, which are in the frontier from now on.
  template <class F>
  void expand(TreeNode v, const F& f) {
    state(v) = kNow;
    each_child(v, [&](TreeNode child) {
      if (child.level) state(child) = -1;
      reached_[count_++] = child;
    });
    evaluate();
    each_child(v, f);
  }

  // Marks the pages that are read anyway; how many.
  int64_t include() const {
    int64_t count = 0;
    for (int64_t w = 0; w < pages_; w++) {
      const int32_t* span = a_.choose.span + 2 * int64_t{table_[w]};
      chosen_[w] = span[0] < a_.choose.sink[row_] || span[1] >= a_.choose.from[row_];
      count += chosen_[w];
    }
    return count;
  }

  // The largest bound of a query over all pages. Only a larger one than that of a known page is looked into.
  float best(int64_t g) {
    float most = -INFINITY;
    for (int64_t i = 0; i < count_; i++)
      if (!reached_[i].level) most = std::max(most, score(reached_[i])[g]);
    NodeHeap heap(keys_);
    for (int64_t i = 0; i < count_; i++)
      if (reached_[i].level && !expanded(reached_[i]) && score(reached_[i])[g] > most)
        heap.add(score(reached_[i])[g], reached_[i]);
    heap.order();
    while (!heap.empty()) {
      const TreeNode v = heap.pop();
      if (!(score(v)[g] > most)) break;
      expand(v, [&](TreeNode child) {
        const float bound = score(child)[g];
        if (child.level) {
          heap.push(bound, child);
        } else {
          most = std::max(most, bound);
        }
      });
    }
    return most;
  }

  // As `choose_pages` ranks: the best page has 0, infinite or not.
  float rank(TreeNode v) const {
    const float* bound = score(v);
    float most = -INFINITY;
    for (int64_t g = 0; g < group_; g++) most = std::max(most, bound[g] == best_[g] ? 0.0f : bound[g] - best_[g]);
    return most;
  }

  void choose(int64_t more) {
    NodeHeap heap(keys_);
    const auto waits = [&](TreeNode v) { return v.level ? !expanded(v) : !chosen_[v.index]; };
    for (int64_t i = 0; i < count_; i++)
      if (waits(reached_[i])) heap.add(rank(reached_[i]), reached_[i]);
    heap.order();
    while (more && !heap.empty()) {
      const TreeNode v = heap.pop();
      if (!v.level) {
        chosen_[v.index] = true;
        more--;
        continue;
      }
      expand(v, [&](TreeNode child) {
        if (waits(child)) heap.push(rank(child), child);
      });
    }
  }

  // Writes the bounds of pages and the states after the step.
  void settle() {
    float* bound = a_.score.bound + row_ * group_ * places_;
    for (int64_t g = 0; g < group_; g++) std::fill_n(bound + g * places_ + pages_, places_ - pages_, -INFINITY);
    for (int level = 1; level <= tree_.top; level++)
      std::fill_n(&state({level, 0}) + counted(level), tree_.size[level] - counted(level), int8_t{-1});
    for (int64_t i = 0; i < counted(tree_.top); i++) settle({tree_.top, i}, bound);
  }

  void settle(TreeNode v, float* bound) {
    const int64_t first = v.place(), end = std::min((v.index + 1) << v.level, pages_);
    if (!expanded(v)) {
      const float* own = score(v);
      for (int64_t g = 0; g < group_; g++)
        for (int64_t w = first; w < end; w++) bound[g * places_ + w] = own[g];
      for (int level = v.level; level > 0; level--) {
        const int64_t begin = first >> level;
        std::fill(&state({level, begin}), &state({level, begin}) + (((end - 1) >> level) + 1 - begin), int8_t{-1});
      }
      return;
    }
    bool used = false;
    each_child(v, [&](TreeNode child) { used |= child.level ? expanded(child) : chosen_[child.index]; });
    each_child(v, [&](TreeNode child) { settle(child, bound); });
    int8_t& age = state(v);
    age = age == kNow || used ? int8_t{0} : int8_t(age + 1);
    if (age >= PageTree::kMergeSteps) age = -1;
  }

  static constexpr int64_t kAhead = 4;  // nodes: their boxes lie anywhere

  const SearchPages& a_;
  const PageTree& tree_;
  const int64_t row_, places_, pages_, group_, width_;
  const int32_t* table_;
  const E* tree_box_;  // of the inner nodes
  int8_t* state_;
  const BoxBounds<E> bounds_;
  float *query_, *score_, *best_;
  bool *evaluated_, *chosen_;
  TreeNode* reached_;  // all that were in the frontier at some time
  uint64_t* keys_;
  int64_t count_ = 0, scored_ = 0, boxes_ = 0;  // nodes that were reached, of which so many were evaluated; boxes
};

inline void search_pages(const SearchPages& a, const Threads& threads) {
  const RowPages& row = a.score.row;
  const PageTree tree(row.table_width);
  with_storage(a.score.type, [&](auto storage) {
    const bool worthwhile = row.rows * row.table_width * row.group * a.score.width > 1 << 16;
    share(threads, row.rows, worthwhile, [&](int64_t r) { TreeSearch<decltype(storage)>(a, tree, r).run(); });
  });
}

}  // namespace kvpress::KERNEL_ISA
