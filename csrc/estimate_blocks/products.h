// Products of codes: whether an estimate is above its bound, anywhere in a block. Three ways, equal to the bit: pairs of
// channels with 16-bit sums (maddubs, or no instruction set at all), fours with 32-bit sums (VNNI), 64 of them (AMX).
#pragma once

#include <cmath>

#include "../include/prompt.h"

namespace kvpress::KERNEL_ISA {

constexpr int kCodeTile = 16;  // keys
constexpr int kMostCode = 7, kBias = kMostCode + 1;
constexpr float kLow = -32768.0f, kHigh = 32767.0f;  // between which estimates saturate
constexpr float kEndless = 1 << 30;                  // a bound that no estimate is above

// The queries of a block.
struct EstimateQueries {
  int64_t count, parts;  // parts: of the channels, that are multiplied together
  int32_t* code;  // the codes of so many channels, repeated to 4 bytes: in parts as in_parts makes them [parts, M]
                  // each, or where Products::kWhole [64, parts]
  int32_t start[BlockMap::kQueries];  // what undoes the bias of the keys
  float inverse[BlockMap::kQueries], bound[BlockMap::kQueries], cap[BlockMap::kQueries];
};

// A block of keys.
struct EstimateKeys {
  const uint8_t* codes;
  int64_t tile_bytes;
  const float* shift;     // of every key
  float step[kCodeTile];  // 1 / scale, of any 16 neighbouring keys
};

// Two channels at a time. Sums of all channels fit in 16 bits.
struct PairProducts {
  static constexpr int kTogether = 2, kStep = 1;  // channels of a part; parts are a multiple of this
  static constexpr bool kWhole = false;           // whether queries are looked at in whole blocks
  struct Scope {};                                // what a task holds while it looks at blocks

  // In which order keys lie in a tile: that in which 32-bit numbers of 8 + 8 keys are packed to 16 bits.
  static constexpr int key_of(int lane) { return lane / 4 == 1 ? lane + 4 : lane / 4 == 2 ? lane - 4 : lane; }

  // Whether the estimate of one of M queries from m0 on is above its bound, anywhere in the block.
  template <int M>
  __attribute__((noinline)) static bool any_above(const EstimateQueries& some, int64_t m0, const EstimateKeys& keys) {
    const uint8_t* tile = keys.codes;
    const int32_t* code = some.code + m0 * some.parts;
#if defined(__AVX2__)
    __m256i sums[M][2];
    KVPRESS_UNROLLED (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm256_set1_epi16(int16_t(some.start[m0 + m]));
    for (int64_t p = 0; p < some.parts; p++, tile += 2 * kCodeTile, code += M) {
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + keys.tile_bytes));
      KVPRESS_UNROLLED (int m = 0; m < M; m++) {
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
    const __m256 steps = _mm256_loadu_ps(keys.step), high = _mm256_set1_ps(kHigh);
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const __m256 inverse = _mm256_set1_ps(some.inverse[m0 + m]);
      const auto whole = [&](int64_t at) {  // a NaN becomes the largest number
        return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_loadu_ps(keys.shift + at), inverse), high));
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
        const float exact = std::floor(some.bound[m0 + m] * keys.step[i % 8]);
        const float bound = exact > some.cap[m0 + m] ? some.cap[m0 + m] : exact;
        if (!(bound >= kLow)) return true;
        int lane = 0;
        while (key_of(lane) != i % kCodeTile) lane++;
        const uint8_t* key = tile + i / kCodeTile * keys.tile_bytes + 2 * lane;
        int32_t dot = some.start[m0 + m];
        for (int64_t p = 0; p < some.parts; p++) {
          const int32_t pair = code[p * M + m];
          dot += key[p * 2 * kCodeTile] * int8_t(pair) + key[p * 2 * kCodeTile + 1] * int8_t(pair >> 8);
        }
        const float moved = std::nearbyint(keys.shift[i] * some.inverse[m0 + m]);
        const float estimate = float(dot) + (moved < kHigh ? std::max(moved, kLow) : kHigh);
        if (std::min(std::max(estimate, kLow), kHigh) > bound) return true;
      }
    }
    return false;
#endif
  }
};

#if defined(__AVX512F__)
// Whether sums of products, 32 bits, are above their bounds. They need not saturate to 16 bits: no bound but kEndless is
// beyond them. Not exact is half the work: neither rounding nor saturation, but a margin wider than both, and a NaN is above.
template <bool kExact>
class Above {
 public:
  Above(const EstimateQueries& some, const EstimateKeys& keys)
      : steps_(_mm512_loadu_ps(keys.step)), first_(_mm512_loadu_ps(keys.shift)),
        second_(_mm512_loadu_ps(keys.shift + kCodeTile)) {
    lowest_ = _mm512_set1_ps(kExact ? kLow : kLow + kMostCode * kMostCode * 4 * float(some.parts) + 4);
  }

  // The sums of query m and the 32 keys.
  void look(const EstimateQueries& some, int64_t m, __m512i first, __m512i second) {
    const __m512 own = _mm512_set1_ps(some.bound[m]), inverse = _mm512_set1_ps(some.inverse[m]);
    const __m512 margin = _mm512_set1_ps(-2.0f);
    const __m512 exact = kExact ? _mm512_floor_ps(_mm512_mul_ps(own, steps_)) : _mm512_fmadd_ps(own, steps_, margin);
    const __m512 bound = _mm512_min_ps(_mm512_set1_ps(some.cap[m]), exact);  // keeps a NaN
    bounded_ = _mm512_mask_cmp_ps_mask(bounded_, bound, lowest_, _CMP_GE_OQ);
    first_below_ = below(first_below_, first, first_, inverse, bound);
    second_below_ = below(second_below_, second, second_, inverse, bound);
  }

  bool any() const { return (bounded_ & first_below_ & second_below_) != kAll; }

 private:
  static constexpr __mmask16 kAll = 0xFFFF;

  static __mmask16 below(__mmask16 before, __m512i sums, __m512 shift, __m512 inverse, __m512 bound) {
    if constexpr (kExact) {
      const __m512 moved =
          _mm512_min_ps(_mm512_mul_ps(shift, inverse), _mm512_set1_ps(kHigh));  // a NaN becomes the largest
      const __m512i estimate = _mm512_add_epi32(sums, _mm512_cvtps_epi32(_mm512_max_ps(moved, _mm512_set1_ps(kLow))));
      return _mm512_mask_cmple_epi32_mask(before, estimate, _mm512_cvtps_epi32(bound));
    } else {
      return _mm512_mask_cmp_ps_mask(before, _mm512_fmadd_ps(shift, inverse, _mm512_cvtepi32_ps(sums)), bound,
                                     _CMP_LE_OQ);
    }
  }

  __m512 steps_, first_, second_, lowest_;  // lowest: a bound below is one that saturation reaches
  __mmask16 bounded_ = kAll, first_below_ = kAll, second_below_ = kAll;
};

// Four channels at a time.
struct QuadProducts {
  static constexpr int kTogether = 4, kStep = 1;
  static constexpr bool kWhole = false;
  struct Scope {};
  static constexpr int key_of(int lane) { return lane; }

  // The same as that of PairProducts.
  template <int M>
  static bool any_above(const EstimateQueries& some, int64_t m0, const EstimateKeys& keys) {
    return above<M, false>(some, m0, keys) && above<M, true>(some, m0, keys);
  }

 private:
  template <int M, bool kExact>
  __attribute__((noinline, target("avx512vnni"))) static bool above(const EstimateQueries& some, int64_t m0,
                                                                    const EstimateKeys& keys) {
    const uint8_t* tile = keys.codes;
    const int32_t* code = some.code + m0 * some.parts;
    __m512i sums[M][2];
    KVPRESS_UNROLLED (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_set1_epi32(some.start[m0 + m]);
    for (int64_t p = 0; p < some.parts; p++, tile += 4 * kCodeTile, code += M) {
      const __m512i first = _mm512_load_si512(tile), second = _mm512_load_si512(tile + keys.tile_bytes);
      KVPRESS_UNROLLED (int m = 0; m < M; m++) {
        const __m512i query = _mm512_set1_epi32(code[m]);
        sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], first, query);
        sums[m][1] = _mm512_dpbusd_epi32(sums[m][1], second, query);
        asm volatile("" : "+v"(sums[m][0]), "+v"(sums[m][1]));  // in their places: else they are copied every time
      }
    }
    Above<kExact> above(some, keys);
    KVPRESS_UNROLLED (int m = 0; m < M; m++) above.look(some, m0 + m, sums[m][0], sums[m][1]);
    return above.any();
  }
};

#if defined(KVPRESS_AMX)
// What a thread's tiles look like: five of 16 rows of 64 bytes. Not a local: compilers see only the start of it being read.
struct TileShape {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShape) == 64);
alignas(64) constexpr TileShape kShape;

// 64 channels of 16 queries and 16 keys at a time.
struct TileProducts {
  static constexpr int kTogether = 4, kStep = 16;
  static constexpr bool kWhole = true;
  static constexpr int64_t kRows = 16;
  static constexpr int key_of(int lane) { return lane; }

  struct Scope {
    __attribute__((target("amx-tile"))) Scope() { _tile_loadconfig(&kShape); }
    __attribute__((target("amx-tile"))) ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
  };

  // Whether the estimate of one of the queries is above its bound, anywhere in the block.
  static bool any_above(const EstimateQueries& some, const EstimateKeys& keys) {
    for (int64_t m = 0; m < some.count; m += kRows)
      if (above<false>(some, m, keys) && above<true>(some, m, keys)) return true;
    return false;
  }

 private:
  template <bool kExact>
  __attribute__((noinline, target("amx-tile,amx-int8"))) static bool above(const EstimateQueries& some, int64_t m0,
                                                                           const EstimateKeys& keys) {
    alignas(64) int32_t sums[2][kRows][kCodeTile];
    const int64_t query_bytes = some.parts * 4, line = 4 * kCodeTile;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t p = 0; p < some.parts; p += kStep) {
      _tile_loadd(2, some.code + m0 * some.parts + p, query_bytes);
      _tile_loadd(3, keys.codes + p * line, line);
      _tile_loadd(4, keys.codes + keys.tile_bytes + p * line, line);
      _tile_dpbsud(0, 2, 3);
      _tile_dpbsud(1, 2, 4);
    }
    _tile_stored(0, sums[0], line);
    _tile_stored(1, sums[1], line);
    Above<kExact> above(some, keys);
    for (int64_t m = 0; m < std::min(kRows, some.count - m0); m++) {
      const __m512i start = _mm512_set1_epi32(some.start[m0 + m]);
      const __m512i first = _mm512_load_si512(sums[0][m]), second = _mm512_load_si512(sums[1][m]);
      above.look(some, m0 + m, _mm512_add_epi32(start, first), _mm512_add_epi32(start, second));
    }
    return above.any();
  }
};
#endif
#endif

}  // namespace kvpress::KERNEL_ISA
