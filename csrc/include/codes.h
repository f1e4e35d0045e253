// Attention on pages of old slots in integers: codes are never made floats.
//
// With x = step · code + zero, Σ_d q_d x_d = Σ_d (q_d · step_d) code_d + Σ_d q_d · zero_d. The factors q_d · step_d are
// rounded to 16 bits, relative to the largest one, and multiplied with codes in pairs: twice the products of an
// instruction for floats, and codes need one shift and one mask. The second sum is of floats. The same holds for values,
// with the weights of a block of slots in the place of the queries.
#pragma once

#include <algorithm>

#include "args.h"
#include "tiles.h"

namespace kvpress::KERNEL_ISA {

// Codes stand in units of 16 words. Vector v of 16 codes is the field v mod (16 / bits) of unit v / (16 / bits).
constexpr int kVector = 16;  // codes: 8 lines (slots of keys, channels of values), each of a pair
constexpr int kUnitBytes = 32;
constexpr int64_t kLines = kVector / 2;
constexpr int64_t kMostFactors = 256;

inline float one_code(const uint8_t* codes, int64_t vector, int64_t i, int64_t bits) {
  const int64_t fields = 16 / bits;
  uint16_t word;
  std::memcpy(&word, codes + vector / fields * kUnitBytes + 2 * i, 2);
  return float(word >> vector % fields * bits & ((1 << bits) - 1));
}

inline void set_code(uint8_t* codes, int64_t vector, int64_t i, int64_t bits, uint8_t code) {
  const int64_t fields = 16 / bits;
  uint8_t* at = codes + vector / fields * kUnitBytes + 2 * i;
  uint16_t word;
  std::memcpy(&word, at, 2);
  word = uint16_t(word | code << vector % fields * bits);
  std::memcpy(at, &word, 2);
}

// Calls f with the bits as a constant.
template <class F>
inline void with_bits(int64_t bits, const F& f) {
  if (bits == 8) f(std::integral_constant<int, 8>{});
  if (bits == 4) f(std::integral_constant<int, 4>{});
  if (bits == 2) f(std::integral_constant<int, 2>{});
}

// The factors of codes, in 16 bits: q[m, c] · step[c] is whole[m, c] · unit[m], 0 beyond the width up to a whole vector;
// bias[m] = Σ_c q[m, c] · zero[c]. All may be read as far as a whole vector.
template <int M>
inline void fold(const float* q, int64_t q_stride, const Float16* step, const Float16* zero, int64_t width,
                 int16_t* whole, int64_t whole_stride, float* unit, float* bias) {
  alignas(64) float factor[M][kMostFactors];
  Vec total[M] = {}, largest[M] = {};
  const auto add = [&](int64_t c, Vec s, Vec z, auto inside) __attribute__((always_inline)) {
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const Vec query = inside(load(q + m * q_stride + c)), x = query * s;
      store(factor[m] + c, x);
      largest[m] = max(magnitude(x), largest[m]);
      total[m] += query * z;
    }
  };
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) add(c, load(step + c), load(zero + c), [](Vec x) { return x; });
  if (c < width) {
    const auto inside = [&](Vec x) { return lanes() < splat(int32_t(width - c)) ? x : Vec{}; };
    add(c, inside(load(step + c)), inside(load(zero + c)), inside);
  }
  for (int m = 0; m < M; m++) {
    const float top = max(largest[m]), scale = top > 0 ? 32767.0f / top : 0.0f;
    bias[m] = sum(total[m]);
    unit[m] = top * (1 / 32767.0f);
    for (c = 0; c < width; c += kWidth) to_whole(load(factor[m] + c) * scale, whole + m * whole_stride + c);
  }
}

// sums[m, line] of V vectors of 8 lines over all pairs: Σ_p whole[m, 2p] · code[2p] + whole[m, 2p + 1] · code[2p + 1].
// Vector v of pair p is number `first + p · stride + v`. kept(m, v, sums of 8 lines) takes them.
#if defined(__AVX2__)
// Vector v of codes from `at` on, which is the field First of a unit; not Whole: field `shift / Bits`, given at run time.
template <int V, int Bits, bool Whole, int First>
inline __m256i load_codes(const uint8_t* at, int v, __m128i shift, __m256i mask) {
  constexpr int kFields = 16 / Bits;
  const int field = (First + v) % kFields;
  __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + (First + v) / kFields * kUnitBytes));
  if constexpr (!Whole) return _mm256_and_si256(_mm256_srl_epi16(word, shift), mask);
  if (field) word = _mm256_srli_epi16(word, field * Bits);
  return field < kFields - 1 ? _mm256_and_si256(word, mask) : word;
}

// Whole: every pair begins with the field First of a unit. Otherwise V is 1.
template <int M, int V, int Bits, bool Whole, int First, class Kept>
inline void multiply_codes(const uint8_t* codes, int64_t first, int64_t stride, int64_t pairs, const int16_t* whole,
                           int64_t whole_stride, Ahead& ahead, const Kept& kept) {
  constexpr uint64_t kFields = 16 / Bits;
  static_assert(Whole || V == 1);
  __m256i sums[M][V];
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int v = 0; v < V; v++) sums[m][v] = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
  const auto add_pair = [&](const uint8_t* at, __m128i shift, const int16_t* factors) __attribute__((always_inline)) {
    __m256i code[V];
    KVPRESS_UNROLLED (int v = 0; v < V; v++) code[v] = load_codes<V, Bits, Whole, First>(at, v, shift, mask);
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const __m256i factor = _mm256_broadcastd_epi32(_mm_loadu_si32(factors + m * whole_stride));
      KVPRESS_UNROLLED (int v = 0; v < V; v++) {
        sums[m][v] = _mm256_add_epi32(sums[m][v], _mm256_madd_epi16(code[v], factor));
        asm volatile("" : "+x"(sums[m][v]));  // one after the other: products that wait push sums out of registers
      }
    }
  };
  if constexpr (Whole) {
    constexpr int64_t kEvery = Ahead::kLines * kLine / (2 * V * Bits);  // pairs: as much is fetched as is read
    const int64_t step = stride / int64_t(kFields) * kUnitBytes;
    const uint8_t* at = codes + uint64_t(first) / kFields * kUnitBytes;
    for (int64_t p = 0; p < pairs; p++, at += step, whole += 2) {
      if (p % kEvery == 0) ahead.fetch();
      add_pair(at, __m128i{}, whole);
    }
  } else {
    for (int64_t p = 0; p < pairs; p++, first += stride, whole += 2)
      add_pair(codes + uint64_t(first) / kFields * kUnitBytes, _mm_cvtsi32_si128(int(uint64_t(first) % kFields) * Bits),
               whole);
  }
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int v = 0; v < V; v++) kept(m, v, _mm256_cvtepi32_ps(sums[m][v]));
}
#else
template <int M, int V, int Bits, bool Whole, int First, class Kept>
inline void multiply_codes(const uint8_t* codes, int64_t first, int64_t stride, int64_t pairs, const int16_t* whole,
                           int64_t whole_stride, Ahead&, const Kept& kept) {
  constexpr int kFields = 16 / Bits;
  int32_t sums[M][V][kLines] = {};
  for (int64_t p = 0; p < pairs; p++) {
    for (int v = 0; v < V; v++) {
      const int64_t vector = first + p * stride + v;
      uint16_t word[kVector];
      std::memcpy(word, codes + vector / kFields * kUnitBytes, kUnitBytes);
      const int shift = int(vector % kFields * Bits);
      for (int m = 0; m < M; m++) {
        const int32_t low = whole[m * whole_stride + 2 * p], high = whole[m * whole_stride + 2 * p + 1];
        for (int i = 0; i < int(kLines); i++)
          sums[m][v][i] +=
              low * (word[2 * i] >> shift & ((1 << Bits) - 1)) + high * (word[2 * i + 1] >> shift & ((1 << Bits) - 1));
      }
    }
  }
  for (int m = 0; m < M; m++) {
    for (int v = 0; v < V; v++) {
      float lines[kLines];
      for (int i = 0; i < int(kLines); i++) lines[i] = float(sums[m][v][i]);
      kept(m, v, lines);
    }
  }
}
#endif

// Several vectors of lines at a time; out[m, line] += unit[m] · sums.
template <int M, int V, int Bits, bool Whole, int First>
__attribute__((noinline)) void add_products(const uint8_t* codes, int64_t first, int64_t stride, int64_t pairs,
                                            const int16_t* whole, int64_t whole_stride, const float* unit, float* out,
                                            int64_t out_stride, Ahead& ahead) {
  multiply_codes<M, V, Bits, Whole, First>(
      codes, first, stride, pairs, whole, whole_stride, ahead,
      [&](int m, int v, auto lines) __attribute__((always_inline)) {
        float* to = out + m * out_stride + v * kLines;
#if defined(__AVX2__)
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(_mm256_set1_ps(unit[m]), lines)));
#else
        for (int i = 0; i < int(kLines); i++) to[i] += unit[m] * lines[i];
#endif
      });
}

// The same for all `vectors` vectors of lines of pairs whose first vector is number `first`.
template <int M, int Bits>
inline void add_all_products(const uint8_t* codes, int64_t first, int64_t vectors, int64_t stride, int64_t pairs,
                             const int16_t* whole, int64_t whole_stride, const float* unit, float* out,
                             int64_t out_stride, Ahead& ahead) {
  constexpr int kFields = 16 / Bits, kMost = M <= 2 ? 4 : 2;
  const auto call = [&](auto V, auto W, auto F, int64_t v) {
    add_products<M, V(), Bits, W(), F()>(codes, first + v, stride, pairs, whole, whole_stride, unit, out + v * kLines,
                                         out_stride, ahead);
  };
  using std::integral_constant;
  int64_t v = 0;
  if (stride % kFields == 0) {
    constexpr integral_constant<bool, true> kWhole{};
    constexpr integral_constant<int, kMost> kV{};
    for (; v + kMost <= vectors && (first + v) % kMost == 0; v += kMost) {
      const int64_t field = (first + v) % kFields;
      if (field == 0) call(kV, kWhole, integral_constant<int, 0>{}, v);
      if constexpr (kFields > kMost) {
        if (field == kMost) call(kV, kWhole, integral_constant<int, kMost>{}, v);
      }
      if constexpr (kFields > 2 * kMost) {
        if (field == 2 * kMost) call(kV, kWhole, integral_constant<int, 2 * kMost>{}, v);
        if (field == 3 * kMost) call(kV, kWhole, integral_constant<int, 3 * kMost>{}, v);
      }
    }
  }
  for (; v < vectors; v++)
    call(integral_constant<int, 1>{}, integral_constant<bool, false>{}, integral_constant<int, 0>{}, v);
}

// Logits of `slots` neighbouring slots of a page (a multiple of kTile) from `offset` on. q is [M, q_stride].
template <int M, int Bits>
__attribute__((noinline)) void page_logits(const Layout& l, const uint8_t* page, const float* q, int64_t q_stride,
                                           int64_t offset, int64_t slots, float* x, int64_t x_stride, Ahead& ahead) {
  alignas(64) int16_t whole[M][kMostFactors];
  for (int64_t i = 0; i < slots;) {
    const int64_t group = (offset + i) / l.key_group,
                  take = std::min(slots - i, (group + 1) * l.key_group - offset - i);
    const auto* step = reinterpret_cast<const Float16*>(page + l.key_scales) + group * 2 * l.key_kept;
    float bias[M], unit[M];
    fold<M>(q, q_stride, step, step + l.key_kept, l.key_kept, whole[0], kMostFactors, unit, bias);
    for (int m = 0; m < M; m++) std::fill_n(x + m * x_stride + i, take, bias[m]);
    add_all_products<M, Bits>(page, (offset + i) / kLines, take / kLines, l.slots / kLines, (l.key_kept + 1) / 2,
                              whole[0], kMostFactors, unit, x + i, x_stride, ahead);
    i += take;
  }
}

// out[m, u] += Σ_s w[m, s] · value[s, u] over `slots` neighbouring slots of a page from `offset` on; w is [M, w_stride].
template <int M, int Bits>
__attribute__((noinline)) void add_page_values(const Layout& l, const uint8_t* page, const float* w, int64_t w_stride,
                                               int64_t offset, int64_t slots, float* out, int64_t out_stride,
                                               Ahead& ahead) {
  alignas(64) int16_t whole[M][kMostFactors];
  const int64_t stride = (l.value_kept + kLines - 1) / kLines;  // vectors of a pair of slots
  for (int64_t g = 0; g < l.value_groups; g++) {
    const auto* step = reinterpret_cast<const Float16*>(page + l.value_scales) + g * l.slots + offset;
    float bias[M], unit[M];
    fold<M>(w, w_stride, step, step + l.value_groups * l.slots, slots, whole[0], kMostFactors, unit, bias);
    const int64_t first = g * l.value_group, end = std::min(first + l.value_group, l.value_kept);
    for (int m = 0; m < M; m++) {
      float* to = out + m * out_stride;
      for (int64_t u = first; u < end; u++) to[u] += bias[m];
    }
    add_all_products<M, Bits>(page + l.value_codes, offset / 2 * stride + first / kLines,
                              (end - first + kLines - 1) / kLines, stride, slots / 2, whole[0], kMostFactors, unit,
                              out + first, out_stride, ahead);
  }
}

}  // namespace kvpress::KERNEL_ISA
