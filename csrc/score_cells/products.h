// The largest product of a query's factors with the cells of a slot of a page. How cells lie: kvpress/formulas/page_cells.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../include/retrieval.h"
#include "../include/simd.h"
#include "../include/tiles.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kMostCellFactors = 256;
constexpr int kFactor = 127;  // the largest one

// whole: [M, kMostCellFactors] factors of all channels, zeros after the last one. most: of M queries. next: as many bytes
// from there on are fetched meanwhile: pages lie anywhere.
#if defined(__AVX2__)
// Adds to sums what F fields of neighbouring units give, from the field First on: as many units as cannot overflow the
// 16 bits of two products of bytes. A call of its own: all of its sums have room in registers.
template <int M, int Bits, int First, int F>
__attribute__((noinline)) void add_fields(const uint8_t* unit, int64_t units, const int8_t* whole, __m256i* sums,
                                          const uint8_t* next) {
  const __m256i mask = _mm256_set1_epi8((1 << Bits) - 1), ones = _mm256_set1_epi16(1);
  __m256i pairs[M][F];
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int f = 0; f < F; f++) pairs[m][f] = _mm256_setzero_si256();
  for (int64_t j = 0; j < units; j++) {
    __builtin_prefetch(next + j * (CellPlaces::kUnit * F * Bits / 8));  // each of the passes over a unit fetches a part
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + j * CellPlaces::kUnit));
    __m256i code[F];
    KVPRESS_UNROLLED (int f = 0; f < F; f++)
      code[f] = _mm256_and_si256(_mm256_srli_epi16(bytes, (First + f) * Bits), mask);
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const int8_t* four = whole + m * kMostCellFactors + j * CellPlaces::kChannels;
      const __m256i factor = _mm256_broadcastd_epi32(_mm_loadu_si32(four));
      KVPRESS_UNROLLED (int f = 0; f < F; f++) {
        pairs[m][f] = _mm256_add_epi16(pairs[m][f], _mm256_maddubs_epi16(code[f], factor));
        asm volatile("" : "+x"(pairs[m][f]));  // one after the other: products that wait push sums out of registers
      }
    }
  }
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int f = 0; f < F; f++)
      sums[m * F + f] = _mm256_add_epi32(sums[m * F + f], _mm256_madd_epi16(pairs[m][f], ones));
}

// The largest sums of the slots of F fields, 8 by 8.
template <int M, int Bits, int First>
inline void largest_of_fields(const uint8_t* unit, int64_t quads, const int8_t (*whole)[kMostCellFactors],
                              __m256i (&most)[M], const uint8_t* next) {
  constexpr int kFields = 2, kPasses = 8 / Bits / kFields;
  constexpr int64_t kTogether = 32767 / (2 * kFactor * ((1 << Bits) - 1));
  __m256i sums[M * kFields];
  for (auto& each : sums) each = _mm256_setzero_si256();
  const uint8_t* part = next + quads * CellPlaces::kUnit / kPasses * (First / kFields);
  for (int64_t j = 0; j < quads; j += kTogether)
    add_fields<M, Bits, First, kFields>(unit + j * CellPlaces::kUnit, std::min(kTogether, quads - j),
                                        whole[0] + j * CellPlaces::kChannels, sums,
                                        part + j * CellPlaces::kUnit / kPasses);
  for (int m = 0; m < M; m++)
    most[m] = _mm256_max_epi32(most[m], _mm256_max_epi32(sums[m * kFields], sums[m * kFields + 1]));
  if constexpr (First + kFields < 8 / Bits) largest_of_fields<M, Bits, First + kFields>(unit, quads, whole, most, next);
}

template <int M, int Bits>
inline void largest_products(const CellPlaces& places, const uint8_t* cell, const int8_t (*whole)[kMostCellFactors],
                             int32_t (&most)[M], const uint8_t* next) {
  const int64_t quads = places.quads(), units = places.bytes() / CellPlaces::kUnit;
  __m256i largest[M];
  for (int m = 0; m < M; m++) largest[m] = _mm256_set1_epi32(INT32_MIN);
  for (int64_t u = 0; u < units; u += quads)
    largest_of_fields<M, Bits, 0>(cell + u * CellPlaces::kUnit, quads, whole, largest, next + u * CellPlaces::kUnit);
  for (int m = 0; m < M; m++) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), largest[m]);
    most[m] = *std::max_element(lane, lane + 8);
  }
}
#else
template <int M, int Bits>
inline void largest_products(const CellPlaces& places, const uint8_t* cell, const int8_t (*whole)[kMostCellFactors],
                             int32_t (&most)[M], const uint8_t*) {
  std::fill_n(most, M, INT32_MIN);
  for (int64_t s = 0; s < places.slots; s++) {
    int32_t sums[M] = {};
    for (int64_t d = 0; d < places.width; d++) {
      const int32_t code = cell[places.at(s, d)] >> places.shift(s) & ((1 << Bits) - 1);
      for (int m = 0; m < M; m++) sums[m] += code * whole[m][d];
    }
    for (int m = 0; m < M; m++) most[m] = std::max(most[m], sums[m]);
  }
}
#endif

}  // namespace kvpress::KERNEL_ISA
