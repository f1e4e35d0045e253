// Which blocks of a prompt's attention hold a logit above its query's threshold. Formula: README.md.
//
// Keys are packed once per row as bytes 1 … 15, a pair of channels of 16 keys in 32 bytes: an instruction multiplies 32 of
// them with bytes of queries and adds pairs. Sums of all channels fit in 16 bits. A task is one block of queries of one
// head; of a block of slots it looks at a few queries at a time, and no further than the first hit.
#pragma once

#include <cmath>

#include "../include/prompt.h"

namespace kvpress::KERNEL_ISA {

constexpr int kCodeTile = 16;  // keys
constexpr int kMostCode = 7, kBias = kMostCode + 1;
constexpr float kLow = -32768.0f, kHigh = 32767.0f;  // between which estimates saturate

class RowEstimate {
 public:
  RowEstimate(const EstimateBlocks& a, int64_t b, int64_t h, const Threads& threads)
      : a_(a), map_(a.map), row_(b * a.heads + h), threads_(threads), pairs_((a.width + 1) / 2) {
    tile_bytes_ = pairs_ * kCodeTile * 2;
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
  bool worthwhile() const { return map_.queries * map_.slots * a_.width > 1 << 18; }

  // In which order keys lie in a tile: that in which 32-bit numbers of 8 + 8 keys are packed to 16 bits.
  static constexpr int key_of(int lane) { return lane / 4 == 1 ? lane + 4 : lane / 4 == 2 ? lane - 4 : lane; }

  void pack(int64_t t) {
    uint8_t* tile = key_ + t * tile_bytes_;
    for (int lane = 0; lane < kCodeTile; lane++) {
      const int64_t s = t * kCodeTile + key_of(lane);
      const int8_t* code = a_.key + (row_ * map_.slots + s) * a_.width;
      for (int64_t d = 0; d < 2 * pairs_; d++)
        tile[d / 2 * 2 * kCodeTile + 2 * lane + d % 2] = uint8_t((s < map_.slots && d < a_.width ? code[d] : 0) + kBias);
    }
  }

  // The queries of a block, in parts as in_parts makes them.
  struct Queries {
    int64_t head, count;
    int32_t* code;           // of every part [pairs, M]: a pair of codes, twice
    int16_t start[BlockMap::kQueries];  // what undoes the bias of the keys
    float inverse[BlockMap::kQueries], bound[BlockMap::kQueries], cap[BlockMap::kQueries];
  };

  void estimate(int64_t row, int64_t head) {
    const int64_t end = map_.end(row), local = map_.first_local(row, a_.local);
    uint8_t* bits = map_.bytes + head * offset_[map_.rows()] + offset_[row];
    std::fill_n(bits, (end + 7) / 8, uint8_t{0});
    const auto set = [&](int64_t j) { bits[j / 8] = uint8_t(bits[j / 8] | 1 << j % 8); };
    set(0);
    for (int64_t j = local; j < end; j++) set(j);
    if (local < 2) return;
    Queries some{};
    read_queries(row, head, some);
    for (int64_t j = 1; j < local; j++) {
      float step[2 * BlockMap::kGroups];  // of 8 neighbouring keys
      for (int i = 0; i < 8; i++) step[i] = 1.0f / a_.key_scale[(row_ * map_.columns() + j) * BlockMap::kGroups + i / 2];
      bool hit = false;
      in_parts(some.count, [&](int64_t m, auto M) { hit = hit || any_above<M()>(some, m, j, step); });
      if (hit) set(j);
    }
  }

  void read_queries(int64_t row, int64_t head, Queries& some) const {
    const int64_t first = head * map_.queries + row * BlockMap::kQueries;
    some.head = head;
    some.count = std::min(BlockMap::kQueries, map_.queries - row * BlockMap::kQueries);
    some.code = scratch<int32_t, struct QueryCodes>(BlockMap::kQueries * pairs_);
    in_parts(some.count, [&](int64_t m0, auto M) {
      for (int64_t m = m0; m < m0 + M; m++) {
        const int8_t* code = a_.query + (first + m) * a_.width;
        int32_t sum = 0;
        for (int64_t p = 0; p < pairs_; p++) {
          const int8_t low = code[2 * p], high = 2 * p + 1 < a_.width ? code[2 * p + 1] : int8_t{0};
          const uint32_t pair = uint32_t{uint8_t(low)} | uint32_t{uint8_t(high)} << 8;
          some.code[m0 * pairs_ + p * M + (m - m0)] = int32_t(pair | pair << 16);
          sum += low + high;
        }
        some.start[m] = int16_t(-kBias * sum);
        some.inverse[m] = 1.0f / a_.query_scale[first + m];
        const float threshold = a_.threshold[first + m];
        some.bound[m] = threshold * some.inverse[m];
        some.cap[m] = threshold == INFINITY ? kHigh : kHigh - kMostCode * kMostCode * float(a_.width) - 1;
      }
    });
  }

  // Whether the estimate of M queries from m0 on is above the bound of one of them, anywhere in block j.
  template <int M>
  __attribute__((noinline)) bool any_above(const Queries& some, int64_t m0, int64_t j, const float* step) const {
    const uint8_t* tile = key_ + j * (BlockMap::kSlots / kCodeTile) * tile_bytes_;
    const int32_t* code = some.code + m0 * pairs_;
    const float* shift = a_.shift + some.head * map_.slots + j * BlockMap::kSlots;  // examined blocks are whole
#if defined(__AVX2__)
    __m256i sums[M][2];
    KVPRESS_UNROLL for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm256_set1_epi16(some.start[m0 + m]);
    for (int64_t p = 0; p < pairs_; p++, tile += 2 * kCodeTile, code += M) {
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + tile_bytes_));
      KVPRESS_UNROLL for (int m = 0; m < M; m++) {
        const __m256i query = _mm256_set1_epi32(code[m]);
        sums[m][0] = _mm256_add_epi16(sums[m][0], _mm256_maddubs_epi16(first, query));
        asm volatile("" : "+x"(sums[m][0]));  // one after the other: products that wait push sums out of registers
        sums[m][1] = _mm256_add_epi16(sums[m][1], _mm256_maddubs_epi16(second, query));
        asm volatile("" : "+x"(sums[m][1]));
      }
    }
    __m256i above = _mm256_setzero_si256();
    __m256 under = _mm256_setzero_ps();  // also where a bound is NaN
    const __m256 low = _mm256_set1_ps(kLow);
    const __m256 steps = _mm256_loadu_ps(step), high = _mm256_set1_ps(kHigh);
    KVPRESS_UNROLL for (int m = 0; m < M; m++) {
      const __m256 inverse = _mm256_set1_ps(some.inverse[m0 + m]);
      const auto whole = [&](int64_t at) {  // a NaN becomes the largest number
        return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_loadu_ps(shift + at), inverse), high));
      };
      const __m256i one = _mm256_adds_epi16(sums[m][0], _mm256_packs_epi32(whole(0), whole(8)));
      const __m256i two = _mm256_adds_epi16(sums[m][1], _mm256_packs_epi32(whole(16), whole(24)));
      const __m256 exact = _mm256_floor_ps(_mm256_mul_ps(_mm256_set1_ps(some.bound[m0 + m]), steps));
      const __m256 bound = _mm256_min_ps(_mm256_set1_ps(some.cap[m0 + m]), exact);  // keeps a NaN
      under = _mm256_or_ps(under, _mm256_cmp_ps(bound, low, _CMP_NGE_UQ));
      const __m256i least = _mm256_cvtps_epi32(_mm256_max_ps(bound, low));
      above = _mm256_or_si256(above, _mm256_cmpgt_epi16(_mm256_max_epi16(one, two), _mm256_packs_epi32(least, least)));
    }
    return _mm256_movemask_epi8(above) != 0 || _mm256_movemask_ps(under) != 0;
#else
    for (int m = 0; m < M; m++) {
      for (int i = 0; i < int(BlockMap::kSlots); i++) {
        const float exact = std::floor(some.bound[m0 + m] * step[i % 8]), bound = exact > some.cap[m0 + m] ? some.cap[m0 + m] : exact;
        if (!(bound >= kLow)) return true;
        int lane = 0;
        while (key_of(lane) != i % kCodeTile) lane++;
        const uint8_t* key = tile + i / kCodeTile * tile_bytes_ + 2 * lane;
        int32_t dot = some.start[m0 + m];
        for (int64_t p = 0; p < pairs_; p++) {
          const int32_t pair = code[p * M + m];
          dot += key[p * 2 * kCodeTile] * int8_t(pair) + key[p * 2 * kCodeTile + 1] * int8_t(pair >> 8);
        }
        const float moved = std::nearbyint(shift[i] * some.inverse[m0 + m]);
        const float estimate = float(dot) + (moved < kHigh ? std::max(moved, kLow) : kHigh);
        if (std::min(std::max(estimate, kLow), kHigh) > bound) return true;
      }
    }
    return false;
#endif
  }

  const EstimateBlocks& a_;
  const BlockMap& map_;
  int64_t row_;
  const Threads& threads_;
  int64_t pairs_, tile_bytes_, tiles_;
  uint8_t* key_;
  const int64_t* offset_;
};

inline void estimate_blocks(const EstimateBlocks& a, const Threads& threads) {
  for (int64_t r = 0; r < a.batch * a.heads; r++) RowEstimate(a, r / a.heads, r % a.heads, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
