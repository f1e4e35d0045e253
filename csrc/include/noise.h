// The counter-based noise of kvpress/formulas/noise.py, bit for bit in its uniform numbers.
#pragma once

#include "simd.h"

namespace kvpress::KERNEL_ISA {

constexpr uint32_t kOdd = 0x9E3779B1u;  // 2³² / golden ratio

template <class Word>
inline Word mix(Word x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Where the numbers of one (seed, layer, query head, query position) start.
inline uint32_t noise_row(uint64_t seed, int64_t layer, int64_t head, int64_t query) {
  const uint32_t stream = mix(mix(mix(uint32_t(seed)) + uint32_t(seed >> 32)) + uint32_t(layer) * kOdd);
  return mix(mix(uint32_t(head) * kOdd + stream) + uint32_t(query) * kOdd);
}

// Exp(1) numbers of the keys at `count` positions, a multiple of kWidth. A loop of its own: a processor looks only so
// many instructions ahead, and these hide their latency behind their neighbours' only if nothing else stands between.
inline void draw_exponential(uint32_t row, const int32_t* position, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const WordVec word = mix(bits_as<WordVec>(load(position + i)) * kOdd + row);
    const Vec uniform = (__builtin_convertvector(bits_as<IntVec>(word >> 9), Vec) + 0.5f) * 0x1p-23f;
    store(to + i, -log(uniform));
  }
}

}  // namespace kvpress::KERNEL_ISA
