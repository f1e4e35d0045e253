// Column sums of (noisy) softmax attention over the queries of a prompt, or its largest. Formulas: README.md.
//
// Per row: keys are packed once into tiles. A task takes some queries of one query head. For a few queries at a time the
// exponentials of all visible slots go to scratch memory that fits in L2, block by block, relative to the largest logit
// so far; once the normalisers are known, the columns are summed with one factor per query and block. Where the output
// is wanted too (attend_sums), each block's exponentials also weigh its values: logits are computed once for both.
#pragma once

#include "../decode_rows/cpu.h"
#include "../include/noise.h"
#include "../include/prompt.h"

namespace kvpress::KERNEL_ISA {

constexpr int kQueryBlock = 2 * kQueries;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kTaskQueries = 2 * kQueryBlock;  // at least
constexpr int64_t kMostTasks = 64;  // of a row, about: each has partial sums of its own, 4 bytes per slot

class RowSums {
 public:
  RowSums(const AttentionSums& a, int64_t b, int64_t h, const Threads& threads)
      : a_(a), b_(b), h_(h), threads_(threads),
        row_(a.key, a.value, b, h, a.slots, a.width, a.out ? a.value_width : 0) {
    tiles_ = row_.tiles;
    panels_ = row_.panels;
    padded_ = (tiles_ * kTile + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    position_ = scratch<int32_t, struct KeyPositions>(padded_);
  }

  void run() {
    row_.pack(threads_, worthwhile());
    offset_ = map_row_offsets<struct SumOffsets>(a_.map);
    const int64_t* position = a_.position + (b_ * a_.heads + h_) * a_.slots;
    for (int64_t s = 0; s < a_.slots; s++) position_[s] = int32_t(std::max<int64_t>(position[s], -1));
    std::fill(position_ + a_.slots, position_ + padded_, -1);
    gaps_ = std::any_of(position_, position_ + a_.slots, [](int32_t p) { return p < 0; });
    const int64_t first = std::max<int64_t>(0, a_.queries - a_.reduction.window), queries = a_.queries - first;
    const int64_t step = std::max<int64_t>(kTaskQueries, (queries * a_.group + kMostTasks - 1) / kMostTasks);
    const int64_t per_head = (queries + step - 1) / step, tasks = per_head * a_.group;
    float* partial = scratch<float, struct PartialSums>(tasks * padded_);
    share(threads_, tasks, worthwhile(), [&](int64_t i) {
      const int64_t begin = first + (per_head - 1 - i / a_.group) * step;  // the longest first
      sum_queries(i % a_.group, begin, std::min(begin + step, a_.queries), partial + i * padded_);
    });
    float* sums = a_.sums + (b_ * a_.heads + h_) * a_.group * a_.slots;
    std::fill_n(sums, a_.group * a_.slots, 0.0f);
    for (int64_t i = 0; i < tasks; i++)
      for (int64_t s = 0; s < a_.slots; s++) {
        float& sum = sums[i % a_.group * a_.slots + s];
        const float part = partial[i * padded_ + s];
        sum = !a_.reduction.largest ? sum + part : part > sum || part != part ? part : sum;
      }
  }

 private:
  // Some queries of one head and what is known of them after some blocks of slots.
  struct Queries {
    int64_t g, q, count;
    const uint8_t* bits;  // of the blocks that are attended to, one byte per block of slots here; or null: all are
    const float* packed;  // as logits_of_tile takes them
    float* weights;       // [count, padded]: exponentials, relative to the reference of their block
    float* reference;     // [count, blocks]
    float* out;           // [panels, count, kPanel], relative to `logit`; or null
    int64_t blocks;
    float largest[kQueryBlock];                  // logit so far, with noise and temperature
    float total[kQueryBlock];                    // of the exponentials relative to it
    float logit[kQueryBlock], sum[kQueryBlock];  // the same without noise and temperature, where there is `out`
  };

  bool worthwhile() const { return a_.slots * a_.width * std::min(a_.queries, a_.reduction.window) > 1 << 16; }

  void sum_queries(int64_t g, int64_t begin, int64_t end, float* sums) {
    std::fill_n(sums, padded_, 0.0f);
    const int64_t most = padded_ / kKeyBlock;
    float* query = scratch<float, struct SumQueries>((kQueryBlock + 1) * a_.width);
    Queries some{};
    some.g = g;
    some.packed = query;
    some.weights = scratch<float, struct SumWeights>(kQueryBlock * padded_);
    some.reference = scratch<float, struct References>(kQueryBlock * most);
    some.out = a_.out ? scratch<float, struct SumOut>(kQueryBlock * panels_ * kPanel) : nullptr;
    for (int64_t q = begin; q < end; q += some.count) {
      some.q = q;
      some.count = std::min<int64_t>(kQueryBlock, end - q);
      some.bits = nullptr;
      if (a_.map.bytes) {  // all queries in one row of the map
        const int64_t row = q / BlockMap::kQueries;
        some.count = std::min(some.count, (row + 1) * BlockMap::kQueries - q);
        const int64_t head = (b_ * a_.heads + h_) * a_.group + g;
        some.bits = a_.map.bytes + head * offset_[a_.map.rows()] + offset_[row];
      }
      pack_queries(some.count, a_.width, query + kQueryBlock * a_.width, query, [&](int64_t i, float* to) {
        read_floats(
            a_.query.data, a_.query.type,
            b_ * a_.query.batch_stride + (h_ * a_.group + g) * a_.query.head_stride + (q + i) * a_.query.token_stride,
            a_.width, float(a_.logits.scaling), to);
      });
      sum_block(some, sums);
    }
  }

  void sum_block(Queries& some, float* sums) {
    const int64_t own = a_.slots - a_.queries + some.q;  // the slot of the first query
    some.blocks = (own + some.count - 1) / kKeyBlock + 1;
    for (int64_t i = 0; i < some.count; i++) {
      some.largest[i] = some.logit[i] = -INFINITY;
      some.total[i] = some.sum[i] = 0;
    }
    if (some.out) std::fill_n(some.out, some.count * panels_ * kPanel, 0.0f);
    for (int64_t k = 0; k < some.blocks; k++) {
      const int64_t first = k * kKeyBlock, slots = std::min(kKeyBlock, tiles_ * kTile - first);
      if (some.bits && !some.bits[k]) {
        leave_out(some, k, slots);
        continue;
      }
      for (int64_t s = 0; s < slots; s += kTile) {  // a tile serves all queries before the next one
        if (!attended(some, k, s)) {
          for (int64_t i = 0; i < some.count; i++)
            std::fill_n(some.weights + i * padded_ + first + s, kTile, -INFINITY);
          continue;
        }
        in_parts(some.count, [&](int64_t m, auto M) {
          Ahead nothing;
          logits_of_tile<M()>(some.packed + m * a_.width, row_.tile((first + s) / kTile), kTile, a_.width,
                              some.weights + m * padded_ + first + s, padded_, nothing);
        });
      }
      for (int64_t i = 0; i < some.count; i++) hide_and_cap(some.weights + i * padded_ + first, first, slots, own + i);
      if (some.out) attend(some, first, slots);
      for (int64_t i = 0; i < some.count; i++) weigh(some, i, k, slots);
    }
    if (some.out) write_out(some);
    a_.reduction.largest ? reduce_columns<true>(some, sums) : reduce_columns<false>(some, sums);
  }

  // Whether the tile at slot s of block k is attended to. The bits of a byte are the blocks of the map in one block here.
  static bool attended(const Queries& some, int64_t k, int64_t s) {
    static_assert(kKeyBlock == 8 * BlockMap::kSlots);
    return !some.bits || (some.bits[k] >> s / BlockMap::kSlots & 1);
  }

  void leave_out(Queries& some, int64_t k, int64_t slots) const {
    for (int64_t i = 0; i < some.count; i++) {
      some.reference[i * some.blocks + k] = -INFINITY;
      std::fill_n(some.weights + i * padded_ + k * kKeyBlock, slots, 0.0f);
    }
  }

  // −∞ for slots that are empty or in the future, and softcap.
  void hide_and_cap(float* x, int64_t first, int64_t slots, int64_t own) const {
    const float cap = float(a_.logits.softcap);
    for (int64_t s = 0; s < slots && cap != 0.0f; s += kWidth) store(x + s, capped(load(x + s), cap));
    if (!gaps_ && first + slots - 1 <= own) return;
    for (int64_t s = 0; s < slots; s += kWidth) {
      const IntVec hidden = (load(position_ + first + s) < 0) | (lanes() > splat(int32_t(own - first - s)));
      store(x + s, hidden ? splat(-INFINITY) : load(x + s));
    }
  }

  // The attention output over one block. Where noise only divides, its exponentials serve the sums too.
  void attend(Queries& some, int64_t first, int64_t slots) {
    float* p =
        divides() || plain() ? some.weights + first : scratch<float, struct Exponentials>(kQueryBlock * kKeyBlock);
    const int64_t stride = divides() || plain() ? padded_ : kKeyBlock;
    for (int64_t i = 0; i < some.count; i++) {
      const float* x = some.weights + i * padded_ + first;
      const float top = std::max(some.logit[i], largest_of(x, slots));
      const float shrink = top == -INFINITY ? 1.0f : std::exp(some.logit[i] - top);
      some.logit[i] = top;
      for (int64_t c = 0; c < panels_ * kPanel && shrink != 1.0f; c++) out_of(some, i, c) *= shrink;
      some.sum[i] = some.sum[i] * shrink + exponentials(x, slots, top, p + i * stride);
    }
    for (int64_t s = 0, end; s < slots; s = end) {  // runs of tiles that are attended to, of all where there is no map
      while (s < slots && !attended(some, first / kKeyBlock, s)) s += kTile;
      for (end = s; end < slots && attended(some, first / kKeyBlock, end);) end += kTile;
      if (s < end) add_run(some, p + s, stride, first + s, end - s);
    }
  }

  void add_run(Queries& some, const float* p, int64_t stride, int64_t first, int64_t slots) const {
    const float* tile[kKeyBlock / kTile];
    for (int64_t panel_of = 0; panel_of < panels_; panel_of++) {
      for (int64_t t = 0; t * kTile < slots; t++) tile[t] = row_.panel(panel_of, first + t * kTile);
      in_parts(some.count, [&](int64_t m, auto M) {
        Ahead nothing;
        add_values<M(), 1>(p + m * stride, stride, tile, slots, 0, kPanel, &out_of(some, m, panel_of * kPanel), kPanel,
                           nothing);
      });
    }
  }

  static float& out_of(const Queries& some, int64_t i, int64_t channel) {
    return some.out[(channel / kPanel * some.count + i) * kPanel + channel % kPanel];
  }

  bool plain() const { return a_.noise.kind == NoiseKind::kNone && a_.noise.tau == 1.0; }
  // exp(x + ζ) = exp(x) / E
  bool divides() const { return a_.noise.kind != NoiseKind::kNone && a_.noise.tau == 1.0; }

  // Turns query i's logits of block k into exponentials, with noise and temperature.
  void weigh(Queries& some, int64_t i, int64_t k, int64_t slots) const {
    const Noise& o = a_.noise;
    float* x = some.weights + i * padded_ + k * kKeyBlock;
    alignas(64) float noise[kKeyBlock];
    if (o.kind != NoiseKind::kNone) {
      const int64_t query = o.kind == NoiseKind::kFresh ? position_[a_.slots - a_.queries + some.q + i] : -1;
      draw_exponential(noise_row(o.seed, o.layer, o.first + h_ * a_.group + some.g, query), position_ + k * kKeyBlock,
                       slots, noise);
    }
    float& reference = some.reference[i * some.blocks + k];
    const bool attended = some.out && (plain() || divides());  // then they are exponentials already
    if (!attended) {
      if (o.tau != 1.0) cool(x, slots, o.kind != NoiseKind::kNone ? noise : nullptr);
      const float top = std::max(some.largest[i], largest_of(x, slots));
      rescale(some, i, top);
      const float sum = exponentials(x, slots, top, x);
      if (!divides()) some.total[i] += sum;
    } else {
      rescale(some, i, some.logit[i]);
      if (plain()) some.total[i] = some.sum[i];
    }
    if (divides()) some.total[i] += divide(x, slots, noise);
    reference = some.largest[i];
  }

  static void rescale(Queries& some, int64_t i, float top) {
    if (top > some.largest[i]) some.total[i] *= std::exp(some.largest[i] - top);
    some.largest[i] = top;
  }

  void cool(float* x, int64_t slots, const float* noise) const {
    const float coldness = float(1.0 / a_.noise.tau);
    for (int64_t s = 0; s < slots; s += kWidth)
      store(x + s, (noise ? load(x + s) - log(load(noise + s)) : load(x + s)) * coldness);
  }

  static float divide(float* x, int64_t slots, const float* noise) {
    Vec sums{};
    for (int64_t s = 0; s < slots; s += kWidth) {
      const Vec weight = load(x + s) / load(noise + s);
      sums += weight;
      store(x + s, weight);
    }
    return sum(sums);
  }

  void write_out(Queries& some) {
    float* out = scratch<float, struct OneOut>(a_.value_width);
    for (int64_t i = 0; i < some.count; i++) {
      for (int64_t d = 0; d < a_.value_width; d++) out[d] = some.sum[i] == 0 ? 0 : out_of(some, i, d) / some.sum[i];
      const int64_t row = (b_ * a_.heads + h_) * a_.group + some.g;
      write_floats(out, a_.value_width, a_.out, a_.query.type, (row * a_.queries + some.q + i) * a_.value_width);
    }
  }

  template <bool kLargest>
  void reduce_columns(Queries& some, float* sums) const {
    const float* weight = a_.reduction.weight ? a_.reduction.weight + b_ * a_.queries + some.q : nullptr;
    float* factor = some.reference;
    for (int64_t i = 0; i < some.count; i++)
      for (int64_t k = 0; k < some.blocks; k++) {
        float& f = factor[i * some.blocks + k];
        f = f == -INFINITY ? 0.0f : std::exp(f - some.largest[i]) / some.total[i] * (weight ? weight[i] : 1.0f);
      }
    for (int64_t k = 0; k < some.blocks; k++) {
      const int64_t first = k * kKeyBlock, last = std::min(first + kKeyBlock, tiles_ * kTile);
      for (int64_t s = first; s < last; s += kWidth) {
        Vec column = load(sums + s);
        for (int64_t i = 0; i < some.count; i++) {
          const Vec term = load(some.weights + i * padded_ + s) * factor[i * some.blocks + k];
          if constexpr (kLargest) {  // one that is no number stays, as in a sum
            column = (term > column) | (term != term) ? term : column;
          } else {
            column += term;
          }
        }
        store(sums + s, column);
      }
    }
  }

  const AttentionSums& a_;
  int64_t b_, h_;
  const Threads& threads_;
  PackedRow row_;
  int64_t tiles_, padded_, panels_;
  int32_t* position_;
  const int64_t* offset_;  // of the rows of the map
  bool gaps_ = false;      // whether some slots are empty
};

inline void attention_sums(const AttentionSums& a, const Threads& threads) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++) RowSums(a, b, h, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
