// Column sums of (noisy) softmax attention over the queries of a prompt. Formulas: README.md.
//
// Per row: keys are packed once into tiles. A task takes some queries of one query head. For a few queries at a time the
// exponentials of all visible slots go to scratch memory that fits in L2, block by block with the block's own maximum;
// once the normalisers are known, the columns are summed with one factor per query and block.
#pragma once

#include "../decode_rows/cpu.h"
#include "../include/noise.h"

namespace kvpress::KERNEL_ISA {

constexpr int kQueryBlock = 2 * kQueries;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kTaskQueries = 2 * kQueryBlock;  // at least
constexpr int64_t kMostTasks = 64;     // of a row, about: each has partial sums of its own, 4 bytes per slot

class RowSums {
 public:
  RowSums(const AttentionSums& a, int64_t b, int64_t h, const Threads& threads) : a_(a), b_(b), h_(h), threads_(threads) {
    tiles_ = (a.slots + kTile - 1) / kTile;
    padded_ = (tiles_ * kTile + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    key_ = scratch<float, struct Keys>(tiles_ * kTile * a.width);
    position_ = scratch<int32_t, struct KeyPositions>(padded_);
  }

  void run() {
    share(threads_, (tiles_ + 15) / 16, worthwhile(), [&](int64_t i) { pack(i * 16, std::min(tiles_, i * 16 + 16)); });
    std::fill(position_ + tiles_ * kTile, position_ + padded_, -1);
    gaps_ = std::any_of(position_, position_ + a_.slots, [](int32_t p) { return p < 0; });
    const int64_t first = std::max<int64_t>(0, a_.queries - a_.window), queries = a_.queries - first;
    const int64_t step = std::max(kTaskQueries, (queries * a_.group + kMostTasks - 1) / kMostTasks);
    const int64_t per_head = (queries + step - 1) / step, tasks = per_head * a_.group;
    float* partial = scratch<float, struct PartialSums>(tasks * padded_);
    share(threads_, tasks, worthwhile(), [&](int64_t i) {
      const int64_t begin = first + (per_head - 1 - i / a_.group) * step;  // the longest first
      sum_queries(i % a_.group, begin, std::min(begin + step, a_.queries), partial + i * padded_);
    });
    float* sums = a_.sums + (b_ * a_.heads + h_) * a_.slots;
    std::fill_n(sums, a_.slots, 0.0f);
    for (int64_t i = 0; i < tasks; i++)
      for (int64_t s = 0; s < a_.slots; s++) sums[s] += partial[i * padded_ + s];
  }

 private:
  bool worthwhile() const { return a_.slots * a_.width * std::min(a_.queries, a_.window) > 1 << 16; }

  void pack(int64_t from, int64_t to) {
    const int64_t* position = a_.position + (b_ * a_.heads + h_) * a_.slots;
    float* slot = scratch<float, struct Slot>(a_.width);
    for (int64_t s = from * kTile; s < to * kTile; s++) {
      const bool inside = s < a_.slots;
      position_[s] = inside ? int32_t(position[s]) : -1;
      if (inside)
        read_floats(a_.key.data, a_.key.type,
                    b_ * a_.key.batch_stride + h_ * a_.key.head_stride + s * a_.key.token_stride, a_.width, 1.0f, slot);
      float* tile = key_ + s / kTile * kTile * a_.width + s % kTile;
      for (int64_t d = 0; d < a_.width; d++) tile[d * kTile] = inside ? slot[d] : 0.0f;
    }
  }

  void sum_queries(int64_t g, int64_t begin, int64_t end, float* sums) {
    std::fill_n(sums, padded_, 0.0f);
    const int64_t blocks = padded_ / kKeyBlock;
    float* weights = scratch<float, struct SumWeights>(kQueryBlock * padded_);
    float* scale = scratch<float, struct Scales>(kQueryBlock * blocks);
    float* query = scratch<float, struct SumQueries>(kQueryBlock * a_.width);
    for (int64_t q = begin; q < end; q += kQueryBlock) {
      const int count = int(std::min<int64_t>(kQueryBlock, end - q));
      for (int i = 0; i < count; i++)
        read_floats(a_.query.data, a_.query.type,
                    b_ * a_.query.batch_stride + (h_ * a_.group + g) * a_.query.head_stride + (q + i) * a_.query.token_stride,
                    a_.width, float(a_.logits.scaling), query + i * a_.width);
      sum_block(g, q, count, query, weights, scale, sums);
    }
  }

  void sum_block(int64_t g, int64_t q, int count, const float* query, float* weights, float* scale, float* sums) {
    const int64_t own = a_.slots - a_.queries + q;  // the slot of the first query
    const int64_t blocks = (own + count - 1) / kKeyBlock + 1;
    float total[kQueryBlock] = {}, largest[kQueryBlock];
    std::fill_n(largest, kQueryBlock, -INFINITY);
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t first = k * kKeyBlock;
      const int tiles = int(std::min(kKeyBlock, tiles_ * kTile - first) / kTile);
      const float* tile[kKeyBlock / kTile];
      for (int t = 0; t < tiles; t++) tile[t] = key_ + (first + t * kTile) * a_.width;
      float* x = weights + first;
      for (int t = 0; t < tiles; t++)  // a tile serves all queries before the next one
        in_parts(count, [&](int64_t m, auto M) {
          Ahead nothing;
          logits_of_tile<M()>(query + m * a_.width, a_.width, tile[t], kTile, a_.width, x + m * padded_ + t * kTile,
                              padded_, nothing);
        });
      for (int i = 0; i < count; i++) {
        scale[i * blocks + k] = -INFINITY;
        weigh(g, q + i, own + i - first, first, tiles * kTile, x + i * padded_, &scale[i * blocks + k], &total[i], &largest[i]);
      }
    }
    for (int i = 0; i < count; i++)
      for (int64_t k = 0; k < blocks; k++) {
        float& factor = scale[i * blocks + k];
        factor = factor == -INFINITY ? 0.0f : std::exp(factor - largest[i]) / total[i];
      }
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t first = k * kKeyBlock, last = std::min(first + kKeyBlock, tiles_ * kTile);
      for (int64_t s = first; s < last; s += kWidth) {
        Vec column = load(sums + s);
        for (int i = 0; i < count; i++) column += load(weights + i * padded_ + s) * scale[i * blocks + k];
        store(sums + s, column);
      }
    }
  }

  // Turns the logits of one query over one block of slots into exponentials relative to the block's maximum, and
  // updates the query's total and maximum. `visible`: how many slots from the block's first the query sees, less one.
  void weigh(int64_t g, int64_t q, int64_t visible, int64_t first, int64_t slots, float* x, float* block_max, float* total,
             float* largest) const {
    const Observation& o = a_.observation;
    const int64_t of_query = o.noise == Noise::kFresh ? position_[a_.slots - a_.queries + q] : -1;
    const uint32_t row = noise_row(o.seed, o.layer, h_ * a_.group + g, of_query);
    const bool noisy = o.noise != Noise::kNone, divides = noisy && o.tau == 1.0;
    const int32_t* position = position_ + first;
    if (a_.logits.softcap != 0.0 || o.tau != 1.0) change(x, slots, position, row, noisy);
    if (gaps_ || visible < slots - 1) hide(x, slots, position, visible);
    Vec top = load(x);
    for (int64_t s = kWidth; s < slots; s += kWidth) top = max(load(x + s), top);
    *block_max = max(top);
    if (*block_max == -INFINITY) {
      std::fill_n(x, slots, 0.0f);
      return;
    }
    Vec sums{};
    for (int64_t s = 0; s < slots; s += kWidth) {
      Vec weight = exp(load(x + s) - *block_max);
      if (divides) weight /= exponential(row, load(position + s));
      sums += weight;
      store(x + s, weight);
    }
    if (*block_max > *largest) {
      *total *= std::exp(*largest - *block_max);
      *largest = *block_max;
    }
    *total += sum(sums) * std::exp(*block_max - *largest);
  }

  // Softcap, noise and temperature. With τ = 1 noise divides the exponentials instead.
  void change(float* x, int64_t slots, const int32_t* position, uint32_t row, bool noisy) const {
    const float cap = float(a_.logits.softcap), coldness = float(1.0 / a_.observation.tau);
    const bool warm = a_.observation.tau != 1.0;
    for (int64_t s = 0; s < slots; s += kWidth) {
      Vec y = capped(load(x + s), cap);
      if (noisy && warm) y -= log(exponential(row, load(position + s)));
      store(x + s, warm ? y * coldness : y);
    }
  }

  static void hide(float* x, int64_t slots, const int32_t* position, int64_t visible) {
    for (int64_t s = 0; s < slots; s += kWidth) {
      const IntVec hidden = (load(position + s) < 0) | (lanes() > splat(int32_t(visible - s)));
      store(x + s, hidden ? splat(-INFINITY) : load(x + s));
    }
  }

  const AttentionSums& a_;
  int64_t b_, h_;
  const Threads& threads_;
  int64_t tiles_, padded_;
  float* key_;
  int32_t* position_;
  bool gaps_ = false;  // whether some slots are empty
};

inline void attention_sums(const AttentionSums& a, const Threads& threads) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++) RowSums(a, b, h, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
