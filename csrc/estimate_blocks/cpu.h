// Which blocks of a prompt's attention hold a logit above its query's threshold. Formula: README.md.
//
// Keys are packed once per row as bytes 1 … 15, some channels of 16 keys side by side; an instruction multiplies them with
// bytes of queries and adds neighbours (products.h). A task is one block of queries of one head; of a block of slots it
// looks at a few queries at a time, and no further than the first hit.
#pragma once

#include "products.h"

namespace kvpress::KERNEL_ISA {

template <class Products>
class RowEstimate {
 public:
  RowEstimate(const EstimateBlocks& a, int64_t b, int64_t h, const Threads& threads)
      : a_(a), map_(a.map), row_(b * a.heads + h), threads_(threads) {
    constexpr int kChannels = Products::kTogether * Products::kStep;
    parts_ = (a.width + kChannels - 1) / kChannels * Products::kStep;
    tile_bytes_ = parts_ * kTileBytes;
    tiles_ = map_.columns() * BlockMap::kSlots / kCodeTile;
  }

  void run() {
    key_ = scratch<uint8_t, struct PackedCodes>(tiles_ * tile_bytes_);
    share(threads_, tiles_, worthwhile(), [&](int64_t t) { pack(t); });
    const int64_t rows = map_.rows();
    offset_ = map_row_offsets<struct EstimateOffsets>(map_);
    share(threads_, rows * a_.group, worthwhile(),
          [&](int64_t i) { estimate(rows - 1 - i / a_.group, row_ * a_.group + i % a_.group); });
  }

 private:
  static constexpr int kTileBytes = kCodeTile * Products::kTogether;  // of as many channels as are multiplied together

  bool worthwhile() const { return map_.queries * map_.slots * a_.width > 1 << 18; }

  void pack(int64_t t) {
    uint8_t* tile = key_ + t * tile_bytes_;
    for (int lane = 0; lane < kCodeTile; lane++) {
      const int64_t s = t * kCodeTile + Products::key_of(lane);
      const int8_t* code = a_.key + (row_ * map_.slots + s) * a_.width;
      for (int64_t d = 0; d < parts_ * Products::kTogether; d++)
        tile[d / Products::kTogether * kTileBytes + lane * Products::kTogether + d % Products::kTogether] =
            uint8_t((s < map_.slots && d < a_.width ? code[d] : 0) + kBias);
    }
  }

  void estimate(int64_t row, int64_t head) {
    const int64_t end = map_.end(row), local = map_.first_local(row, a_.local);
    uint8_t* bits = map_.bytes + head * offset_[map_.rows()] + offset_[row];
    std::fill_n(bits, (end + 7) / 8, uint8_t{0});
    const auto set = [&](int64_t j) { bits[j / 8] = uint8_t(bits[j / 8] | 1 << j % 8); };
    set(0);
    for (int64_t j = local; j < end; j++) set(j);
    if (local < 2) return;
    EstimateQueries some{};
    some.parts = parts_;
    read_queries(row, head, some);
    EstimateKeys keys{};
    keys.tile_bytes = tile_bytes_;
    [[maybe_unused]] const typename Products::Scope scope{};
    for (int64_t j = 1; j < local; j++) {
      keys.codes = key_ + j * (BlockMap::kSlots / kCodeTile) * tile_bytes_;
      keys.shift = a_.shift + head * map_.slots + j * BlockMap::kSlots;  // examined blocks are whole
      const float* scale = a_.key_scale + (row_ * map_.columns() + j) * BlockMap::kGroups;
      for (int i = 0; i < kCodeTile; i++) keys.step[i] = 1.0f / scale[i % 8 / 2];
      if (any_above(some, keys)) set(j);
    }
  }

  static bool any_above(const EstimateQueries& some, const EstimateKeys& keys) {
    if constexpr (Products::kWhole) {
      return Products::any_above(some, keys);
    } else {
      bool hit = false;
      in_parts(some.count, [&](int64_t m, auto M) { hit = hit || Products::template any_above<M()>(some, m, keys); });
      return hit;
    }
  }

  void read_queries(int64_t row, int64_t head, EstimateQueries& some) const {
    const int64_t first = head * map_.queries + row * BlockMap::kQueries;
    some.count = std::min(BlockMap::kQueries, map_.queries - row * BlockMap::kQueries);
    some.code = scratch<int32_t, struct QueryCodes>(BlockMap::kQueries * parts_);
    std::fill(some.code + some.count * parts_, some.code + BlockMap::kQueries * parts_, 0);
    in_parts(some.count, [&](int64_t m0, auto M) {
      for (int64_t m = m0; m < m0 + M; m++) {
        const int8_t* code = a_.query + (first + m) * a_.width;
        int32_t sum = 0;
        for (int64_t d = 0; d < a_.width; d++) sum += code[d];
        for (int64_t p = 0; p < parts_; p++) {
          uint32_t word = 0;
          for (int i = 0; i < 4; i++) {
            const int64_t d = p * Products::kTogether + i % Products::kTogether;
            word |= uint32_t{uint8_t(d < a_.width ? code[d] : 0)} << 8 * i;
          }
          some.code[Products::kWhole ? m * parts_ + p : m0 * parts_ + p * M + (m - m0)] = int32_t(word);
        }
        some.start[m] = -kBias * sum;
        some.inverse[m] = 1.0f / a_.query_scale[first + m];
        const float threshold = a_.threshold[first + m];
        some.bound[m] = threshold * some.inverse[m];
        some.cap[m] = threshold == INFINITY ? kEndless : kHigh - kMostCode * kMostCode * float(a_.width) - 1;
      }
    });
  }

  const EstimateBlocks& a_;
  const BlockMap& map_;
  int64_t row_;
  const Threads& threads_;
  int64_t parts_, tile_bytes_, tiles_;
  uint8_t* key_;
  const int64_t* offset_;
};

template <class Products>
inline void estimate_blocks(const EstimateBlocks& a, const Threads& threads) {
  for (int64_t r = 0; r < a.batch * a.heads; r++) RowEstimate<Products>(a, r / a.heads, r % a.heads, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
