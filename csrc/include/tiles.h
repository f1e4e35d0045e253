// The two products of attention on tiles of 16 slots: logits from channel-major keys, output from slot-major values.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace kvpress::KERNEL_ISA {

constexpr int kTile = 16;                         // slots whose keys lie side by side
constexpr int kVectors = kTile / kWidth;          // vectors in a tile
constexpr int kSums = kRegisters * 3 / 4;         // vectors that fit beside their operands
constexpr int kQueries = kRegisters == 32 ? 8 : 4;  // queries of one call
constexpr int kLine = 64;  // bytes of a cache line
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int power_of_two_below(int n) { return n >= 4 ? 4 : n >= 2 ? 2 : 1; }

// x[m, t·16 + i] = q[m, :] · key of slot i of tile t, for M queries and T tiles at a time.
// `ahead`, unless null: tiles that are fetched into L2 meanwhile. Hardware does not look beyond a 4 KiB page:
// without this memory and arithmetic take turns.
template <int M, int T, class E>
inline void logits_of(const float* q, int64_t q_stride, const E* const* tile, const E* const* ahead,
                      int64_t channel_stride, int64_t width, float* x, int64_t x_stride) {
  Vec sums[M][T * kVectors] = {};
  for (int64_t d = 0; d < width; d++) {
    Vec key[T * kVectors];
    if (ahead)
      for (int t = 0; t < T; t++) fetch(ahead[t] + d * channel_stride);
    for (int t = 0; t < T; t++)
      for (int v = 0; v < kVectors; v++) key[t * kVectors + v] = load(tile[t] + d * channel_stride + v * kWidth);
    for (int m = 0; m < M; m++) {
      const Vec query = splat(q[m * q_stride + d]);
      for (int v = 0; v < T * kVectors; v++) sums[m][v] += query * key[v];
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < T * kVectors; v++) store(x + m * x_stride + v * kWidth, sums[m][v]);
}

// The same for any number of tiles.
template <int M, class E>
inline void logits_of_tiles(const float* q, int64_t q_stride, const E* const* tile, const E* const* ahead, int tiles,
                            int64_t channel_stride, int64_t width, float* x, int64_t x_stride) {
  constexpr int T = power_of_two_below(kSums / (M * kVectors));
  int t = 0;
  for (; t + T <= tiles; t += T)
    logits_of<M, T>(q, q_stride, tile + t, ahead ? ahead + t : nullptr, channel_stride, width, x + t * kTile, x_stride);
  for (; t < tiles; t++)
    logits_of<M, 1>(q, q_stride, tile + t, ahead ? ahead + t : nullptr, channel_stride, width, x + t * kTile, x_stride);
}

// out[m, 0 … N·kWidth) += Σ_s w[m, s] · value[s, :], over the first `slots` slots of some tiles.
template <int M, int N, class E>
inline void add_values(const float* w, int64_t w_stride, const E* const* tile, const E* const* ahead, int64_t slots,
                       int64_t width, float* out, int64_t out_stride) {
  Vec sums[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = load(out + m * out_stride + n * kWidth);
  for (int64_t first = 0; first < slots; first += kTile) {
    const E* value = tile[first / kTile];
    const int64_t last = first + kTile < slots ? first + kTile : slots;
    for (int64_t s = first; s < last; s++, value += width) {
      Vec channel[N];
      if (ahead)
        for (int n = 0; n < N; n += std::max<int>(1, kLine / (kWidth * sizeof(E))))
          fetch(ahead[first / kTile] + (s - first) * width + n * kWidth);
      for (int n = 0; n < N; n++) channel[n] = load(value + n * kWidth);
      for (int m = 0; m < M; m++) {
        const Vec weight = splat(w[m * w_stride + s]);
        for (int n = 0; n < N; n++) sums[m][n] += weight * channel[n];
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(out + m * out_stride + n * kWidth, sums[m][n]);
}

// The same for any width; channels beyond the last whole vector one by one.
template <int M, class E>
inline void add_all_values(const float* w, int64_t w_stride, const E* const* tile, const E* const* ahead, int64_t slots,
                           int64_t width, float* out, int64_t out_stride) {
  constexpr int N = power_of_two_below(kSums / M);
  const E *shifted[8], *shifted_ahead[8];
  const int64_t tiles = (slots + kTile - 1) / kTile;
  int64_t d = 0;
  const auto from = [&](int64_t channel) {
    for (int64_t t = 0; t < tiles; t++) shifted[t] = tile[t] + channel;
    for (int64_t t = 0; t < tiles && ahead; t++) shifted_ahead[t] = ahead[t] + channel;
    return shifted;
  };
  const E* const* next = ahead ? shifted_ahead : nullptr;
  for (; d + N * kWidth <= width; d += N * kWidth)
    add_values<M, N>(w, w_stride, from(d), next, slots, width, out + d, out_stride);
  for (; d + kWidth <= width; d += kWidth)
    add_values<M, 1>(w, w_stride, from(d), next, slots, width, out + d, out_stride);
  for (; d < width; d++)
    for (int m = 0; m < M; m++)
      for (int64_t s = 0; s < slots; s++)
        out[m * out_stride + d] += w[m * w_stride + s] * to_float(tile[s / kTile][s % kTile * width + d]);
}

// Calls f with the compile-time constant that equals `queries`, 1 … kQueries.
template <class F, int... M>
inline void with_queries(int queries, const F& f, std::integer_sequence<int, M...>) {
  (void)((queries == M + 1 ? (f(std::integral_constant<int, M + 1>{}), true) : false) || ...);
}
template <class F>
inline void with_queries(int queries, const F& f) {
  with_queries(queries, f, std::make_integer_sequence<int, kQueries>{});
}

}  // namespace kvpress::KERNEL_ISA
