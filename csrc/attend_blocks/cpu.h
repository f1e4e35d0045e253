// Causal attention over the blocks of a bit map. Formula and numerics: README.md.
//
// Per row: keys and values are packed once. A task is one block of queries of one head: the blocks of its map row go, a
// few at a time, through logits, a running maximum and weighted values, as in attention_sums.
#pragma once

#include "../include/prompt.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kTogetherBlocks = 4;  // of slots, between two looks at the largest logits
constexpr int64_t kTogether = kTogetherBlocks * BlockMap::kSlots;
constexpr int64_t kLogitStride = kTogether + kTile;  // no power of two: it would put all queries into few cache sets

class BlockAttention {
 public:
  BlockAttention(const AttendBlocks& a, int64_t b, int64_t h, const Threads& threads)
      : a_(a), map_(a.map), b_(b), h_(h), threads_(threads),
        row_(a.key, a.value, b, h, a.map.slots, a.width, a.value_width) {}

  void run() {
    const int64_t rows = map_.rows();
    const bool worthwhile = map_.slots * a_.width * map_.queries > 1 << 16;
    row_.pack(threads_, worthwhile);
    offset_ = map_row_offsets<struct MapOffsets>(map_);
    share(threads_, rows * a_.group, worthwhile,
          [&](int64_t i) { attend(rows - 1 - i / a_.group, (b_ * a_.heads + h_) * a_.group + i % a_.group); });
  }

 private:
  // Some queries of one head, and what is known of them after some blocks.
  struct Queries {
    int64_t first, count;
    float *packed, *x, *out;  // as logits_of_tile takes them; [count, kLogitStride]; [panels, count, kPanel]
    float largest[BlockMap::kQueries], total[BlockMap::kQueries];
  };

  void attend(int64_t row, int64_t head) {
    Queries some{};
    some.first = row * BlockMap::kQueries;
    some.count = std::min(BlockMap::kQueries, map_.queries - some.first);
    some.packed = scratch<float, struct BlockQueries>((BlockMap::kQueries + 1) * a_.width);
    some.x = scratch<float, struct BlockLogits>(BlockMap::kQueries * kLogitStride);
    some.out = scratch<float, struct BlockOut>(BlockMap::kQueries * row_.panels * kPanel);
    std::fill_n(some.largest, some.count, -INFINITY);
    std::fill_n(some.total, some.count, 0.0f);
    std::fill_n(some.out, some.count * row_.panels * kPanel, 0.0f);
    pack_queries(some.count, a_.width, some.packed + BlockMap::kQueries * a_.width, some.packed,
                 [&](int64_t i, float* to) {
                   read_floats(a_.query.data, a_.query.type,
                               b_ * a_.query.batch_stride + (head - b_ * a_.heads * a_.group) * a_.query.head_stride +
                                   (some.first + i) * a_.query.token_stride,
                               a_.width, float(a_.scaling), to);
                 });
    const uint8_t* bits = map_.bytes + head * offset_[map_.rows()] + offset_[row];
    int64_t block[kTogetherBlocks], blocks = 0;
    for (int64_t j = 0, end = map_.end(row); j < end; j++) {
      if (bits[j / 8] >> j % 8 & 1) block[blocks++] = j;
      if (blocks == kTogetherBlocks || (j + 1 == end && blocks)) {
        add_blocks(some, block, blocks);
        blocks = 0;
      }
    }
    write(some, head);
  }

  void add_blocks(Queries& some, const int64_t* block, int64_t blocks) {
    for (int64_t k = 0; k < blocks; k++)
      for (int64_t s = 0; s < BlockMap::kSlots; s += kTile)
        in_parts(some.count, [&](int64_t m, auto M) {
          Ahead nothing;
          const int64_t tile =
              std::min((block[k] * BlockMap::kSlots + s) / kTile, row_.tiles - 1);  // hidden where beyond
          logits_of_tile<M()>(some.packed + m * a_.width, row_.tile(tile), kTile, a_.width,
                              some.x + m * kLogitStride + k * BlockMap::kSlots + s, kLogitStride, nothing);
        });
    const int64_t slots = blocks * BlockMap::kSlots, own = map_.slots - map_.queries + some.first;
    for (int64_t i = 0; i < some.count; i++) {
      float* x = some.x + i * kLogitStride;
      for (int64_t k = blocks; k-- > 0 && (block[k] + 1) * BlockMap::kSlots > own + i + 1;)  // blocks ascend
        for (int64_t s = std::max<int64_t>(0, own + i + 1 - block[k] * BlockMap::kSlots); s < BlockMap::kSlots; s++)
          x[k * BlockMap::kSlots + s] = -INFINITY;
      const float top = std::max(some.largest[i], largest_of(x, slots));
      const float shrink = top == -INFINITY ? 1.0f : std::exp(some.largest[i] - top);
      some.largest[i] = top;
      for (int64_t p = 0; p < row_.panels && shrink != 1.0f; p++)
        for (int64_t c = 0; c < kPanel; c++) some.out[(p * some.count + i) * kPanel + c] *= shrink;
      some.total[i] = some.total[i] * shrink + exponentials(x, slots, top, x);
    }
    const float* value[kTogether / kTile];
    for (int64_t p = 0; p < row_.panels; p++) {
      for (int64_t t = 0; t * kTile < slots; t++) {
        const int64_t slot = block[t * kTile / BlockMap::kSlots] * BlockMap::kSlots + t * kTile % BlockMap::kSlots;
        value[t] = row_.panel(p, std::min(slot, (row_.tiles - 1) * kTile));
      }
      in_parts(some.count, [&](int64_t m, auto M) {
        Ahead nothing;
        add_values<M(), 1>(some.x + m * kLogitStride, kLogitStride, value, slots, 0, kPanel,
                           some.out + (p * some.count + m) * kPanel, kPanel, nothing);
      });
    }
  }

  void write(const Queries& some, int64_t head) const {
    float* out = scratch<float, struct OneBlockOut>(row_.panels * kPanel);
    for (int64_t i = 0; i < some.count; i++) {
      const float factor = some.total[i] == 0 ? 0.0f : 1.0f / some.total[i];
      for (int64_t c = 0; c < row_.panels * kPanel; c++)
        out[c] = some.out[(c / kPanel * some.count + i) * kPanel + c % kPanel] * factor;
      const int64_t query = head * map_.queries + some.first + i;
      write_floats(out, a_.value_width, a_.out, a_.query.type, query * a_.value_width);
      a_.lse[query] = some.largest[i] + std::log(some.total[i]);
    }
  }

  const AttendBlocks& a_;
  const BlockMap& map_;
  int64_t b_, h_;
  const Threads& threads_;
  PackedRow row_;
  const int64_t* offset_;
};

inline void attend_blocks(const AttendBlocks& a, const Threads& threads) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++) BlockAttention(a, b, h, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
