// Vectors of floats, as wide as the instruction set of this translation unit.
//
// kernels.cpp is compiled once per instruction set with its own KERNEL_ISA (a namespace) and flags. The vector
// extensions of GCC and Clang give one source for AVX-512, AVX2, NEON and machines without either.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace kvpress::KERNEL_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kWidth = 4;
constexpr int kRegisters = 32;
#else
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
#endif

constexpr int kBytes = kWidth * 4;
typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t IntVec __attribute__((vector_size(kBytes)));
typedef uint32_t WordVec __attribute__((vector_size(kBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return x - IntVec{}; }
inline WordVec splat(uint32_t x) { return x - WordVec{}; }

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// Conversions from the storage types. All are exact.

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
#if defined(__AVX2__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return bits_as<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // infinite or NaN
  const float scaled = bits_as<float>(rest << 13) * 0x1p112f;  // also right for subnormal numbers
  return bits_as<float>(sign | bits_as<uint32_t>(scaled));
#endif
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline IntVec load(const int32_t* p) {
  IntVec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// By hand: compilers convert whole vectors of 16-bit integers in halves.
inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  return bits_as<Vec>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return bits_as<Vec>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#elif defined(__ARM_NEON)
  return bits_as<Vec>(vshll_n_u16(vld1_u16(&p->bits), 16));
#else
  Vec x;
  for (int i = 0; i < kWidth; i++) x[i] = to_float(p[i]);
  return x;
#endif
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return bits_as<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bits_as<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON)
  return bits_as<Vec>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))));
#else
  Vec x;
  for (int i = 0; i < kWidth; i++) x[i] = to_float(p[i]);
  return x;
#endif
}

// Two vectors of neighbouring numbers, in an order that depends on the storage alone; `in_order` undoes it.
template <class E>
inline void load_pair(const E* p, Vec* pair) {
  pair[0] = load(p);
  pair[1] = load(p + kWidth);
}
template <class E>
inline void in_order(const E*, Vec*) {}
// One of them.
template <int I, class E>
inline Vec load_half(const E* p) {
  return load(p + I * kWidth);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Numbers at even places, then those at odd ones: half the instructions of a conversion in order.
inline void load_pair(const BFloat16* p, Vec* pair) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  pair[0] = bits_as<Vec>(_mm256_slli_epi32(words, 16));
  pair[1] = bits_as<Vec>(_mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000))));
}
template <int I>
inline Vec load_half(const BFloat16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bits_as<Vec>(I ? _mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(words, 16));
}
inline void in_order(const BFloat16*, Vec* pair) {
  const __m256 low = _mm256_unpacklo_ps(pair[0], pair[1]), high = _mm256_unpackhi_ps(pair[0], pair[1]);
  pair[0] = _mm256_permute2f128_ps(low, high, 0x20);
  pair[1] = _mm256_permute2f128_ps(low, high, 0x31);
}
#endif

// Roundings to the storage types: to nearest, ties to even, as PyTorch does.

inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, BFloat16* p) {
  const uint32_t word = bits_as<uint32_t>(x);
  p->bits = x != x ? 0x7FC0 : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
inline void from_float(float x, Float16* p) {
#if defined(__AVX2__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON)
  const __fp16 half = x;
  std::memcpy(p, &half, sizeof half);
#else
  const uint32_t word = bits_as<uint32_t>(x), sign = word >> 16 & 0x8000, rest = word & 0x7FFFFFFF;
  uint32_t half;
  if (rest > 0x7F800000) {
    half = 0x7E00;
  } else if (rest >= 0x477FF000) {
    half = 0x7C00;
  } else if (rest < 0x38800000) {  // subnormal: let the adder round
    half = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3F000000;
  } else {
    half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
  }
  p->bits = sign | half;
#endif
}

// Reductions, in an order that does not depend on anything but the width. Of a NaN, `max` takes the other number.

#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float max(Vec x) { return _mm512_reduce_max_ps(x); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float max(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += x[i];
  return total;
}
inline float max(Vec x) {
  float largest = x[0];
  for (int i = 1; i < kWidth; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}
#endif

// `negative` where the sign bit of x is set, otherwise `other`: one instruction less than after a comparison.
inline Vec by_sign(Vec x, Vec negative, Vec other) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(bits_as<__m512i>(x)), other, negative);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(other, negative, x);
#else
  return bits_as<IntVec>(x) < 0 ? negative : other;
#endif
}

// To the nearest whole numbers, of at most 16 bits.
inline void to_whole(Vec x, int16_t* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
#elif defined(__AVX2__)
  const __m256i whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#else
  for (int i = 0; i < kWidth; i++) p[i] = int16_t(std::nearbyint(x[i]));
#endif
}

inline IntVec lanes() {
  IntVec x;
  for (int i = 0; i < kWidth; i++) x[i] = i;
  return x;
}

inline Vec magnitude(Vec x) { return bits_as<Vec>(bits_as<IntVec>(x) & 0x7FFFFFFF); }

// Polynomials are summed in pairs (Estrin): their latency, not their number of operations, limits the loops around them.

// exp(x) to 2 units in the last place for x ≤ 88; exactly 0 below −87; a NaN stays one.
inline Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5·2²³: adding it rounds to a whole number
  const Vec clamped = max(x, splat(-88.0f));
  const Vec rounded = clamped * 1.44269504088896341f + shift;
  const Vec n = rounded - shift;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  const Vec r2 = r * r;
  const Vec high = (r * 1.9875691500e-4f + 1.3981999507e-3f) * r2 + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  const Vec p = (high * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f)) * r2 + (r + 1.0f);
  const Vec y = bits_as<Vec>((bits_as<IntVec>(rounded) << 23) + bits_as<IntVec>(p));
  return x > -87.0f ? y : (x == x ? Vec{} : x);
}

// ln(x) to 2 units in the last place for positive normal x.
inline Vec log(Vec x) {
  // x = 2^e · m with m in [√½, √2)
  const IntVec word = bits_as<IntVec>(x) - 0x3F3504F3;
  const Vec e = __builtin_convertvector(word >> 23, Vec);
  const Vec t = bits_as<Vec>((word & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const Vec z = t * t, z2 = z * z;
  const Vec top = (t * -1.1514610310e-1f + 1.1676998740e-1f) + z * 7.0376836292e-2f;
  const Vec middle = (t * -1.2420140846e-1f + 1.4249322787e-1f) * z + (t * -1.6668057665e-1f + 2.0000714765e-1f);
  const Vec low = t * -2.4999993993e-1f + 3.3333331174e-1f;
  const Vec p = (top * z2 + middle) * z + low;
  return (p * t * z + e * -2.12194440e-4f - 0.5f * z) + t + e * 0.693359375f;
}

// tanh(x) to 3 units in the last place.
inline Vec tanh(Vec x) {
  const Vec size = magnitude(x);
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  const Vec far = 1.0f - 2.0f / (exp(2.0f * (size < 40.0f ? size : splat(40.0f))) + 1.0f);
  const Vec y = size < 0.625f ? near : (x < 0.0f ? -far : far);
  return x == x ? y : x;
}

// softcap(x) = c·tanh(x / c), or x itself where there is no cap
inline Vec capped(Vec x, float cap) { return cap == 0.0f ? x : tanh(x * (1.0f / cap)) * cap; }

}  // namespace kvpress::KERNEL_ISA
