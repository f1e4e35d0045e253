// The two products of attention on tiles of 16 slots: logits from channel-major keys, output from slot-major values.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace kvpress::KERNEL_ISA {

constexpr int kTile = 16;                           // slots whose keys lie side by side
constexpr int kVectors = kTile / kWidth;            // vectors in a tile
constexpr int kSums = kRegisters * 3 / 4;           // vectors that fit beside their operands
constexpr int kQueries = kRegisters == 32 ? 8 : 6;  // queries of one call
constexpr int kLine = 64;                           // bytes of a cache line

// Loops over registers: what is not unrolled early ends in memory.
#define KVPRESS_UNROLLED(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

constexpr int power_of_two_below(int n) { return n >= 4 ? 4 : n >= 2 ? 2 : 1; }

// Memory that is fetched while something else is computed: a cache line from each of several places at a time.
//
// Hardware does not look beyond a 4 KiB page, and a page lies on one memory channel: reading page after page leaves
// the other channels idle. In turn, 8 pages keep all of them busy (+40 % on 2 cores of a Zen 3 server).
class Ahead {
 public:
  static constexpr int kPlaces = 4;  // of keys, and as many of values
  static constexpr int kLines = 2 * kPlaces;

  // `lines` cache lines from each place on, `step` bytes apart.
  void keys(int place, const void* from, int64_t step, int64_t lines) { set(place, 0, from, step, lines); }
  void values(int place, const void* from, int64_t step, int64_t lines) { set(place, 1, from, step, lines); }
  // Of either kind, where that makes no difference.
  void place(int place, const void* from, int64_t step, int64_t lines) {
    set(place % kPlaces, place / kPlaces, from, step, lines);
  }

  // Starts the next kLines lines.
  void fetch() {
    if (left_ <= 0) return;
    left_--;
    for (int i = 0; i < kPlaces; i++) {
      __builtin_prefetch(from_[0][i] + at_[0]);
      __builtin_prefetch(from_[1][i] + at_[1]);
    }
    for (int kind = 0; kind < 2; kind++) at_[kind] += step_[kind];
  }

 private:
  void set(int place, int kind, const void* from, int64_t step, int64_t lines) {
    from_[kind][place] = static_cast<const char*>(from);
    step_[kind] = step;
    left_ = std::max(left_, lines);
  }

  const char* from_[2][kPlaces];
  int64_t step_[2], at_[2] = {}, left_ = 0;
};

// The numbers of the 16 slots of a tile, in the order of load_pair.
template <class E>
inline void load_tile(const E* p, Vec* row) {
  if constexpr (kVectors == 2) {
    load_pair(p, row);
  } else {
    for (int v = 0; v < kVectors; v++) row[v] = load(p + v * kWidth);
  }
}

// x[m, i] = query m · key of slot i of a tile. q: M queries, [width, M].
template <int M, class E>
__attribute__((noinline)) void logits_of_tile(const float* q, const E* tile, int64_t channel_stride, int64_t width,
                                              float* x, int64_t x_stride, Ahead& ahead) {
  constexpr int kParts = power_of_two_below(kSums / (M * kVectors));         // sums that do not wait for each other
  constexpr int kRows = std::max<int>(1, kLine / (kTile * int(sizeof(E))));  // channels in a cache line
  constexpr int kStep = std::max(kParts, Ahead::kLines * kRows);
  Vec sums[kParts][M][kVectors] = {};
  const auto add = [&](int64_t d, int part) __attribute__((always_inline)) {
    Vec key[kVectors];
    load_tile(tile + d * channel_stride, key);
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const Vec query = splat(q[d * M + m]);
      KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) sums[part][m][v] += query * key[v];
    }
  };
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
    ahead.fetch();
    for (int64_t end = d + kStep, i = d; i < end; i += kParts)
      KVPRESS_UNROLLED (int part = 0; part < kParts; part++) add(i + part, part);
  }
  for (; d < width; d++) add(d, 0);
  KVPRESS_UNROLLED (int m = 0; m < M; m++) {
    KVPRESS_UNROLLED (int part = 1; part < kParts; part++)
      KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) sums[0][m][v] += sums[part][m][v];
    if constexpr (kVectors == 2) in_order(tile, sums[0][m]);
    KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) store(x + m * x_stride + v * kWidth, sums[0][m][v]);
  }
}

// out[m, 0 … 2·N·kWidth) += Σ_s w[m, s] · value[s, offset …], over the first `slots` slots of some tiles; the channels
// in the order of load_pair.
template <int M, int N, class E>
__attribute__((noinline)) void add_values(const float* w, int64_t w_stride, const E* const* tile, int64_t slots,
                                          int64_t offset, int64_t width, float* out, int64_t out_stride, Ahead& ahead) {
  constexpr int kSlots =
      std::max<int>(1, Ahead::kLines * kLine / (2 * N * kWidth * int(sizeof(E))));  // of kLines lines
  Vec sums[M][2 * N];
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int n = 0; n < 2 * N; n++) sums[m][n] = load(out + m * out_stride + n * kWidth);
  for (int64_t first = 0; first < slots; first += kTile) {
    const E* value = tile[first / kTile] + offset;
    const int64_t last = std::min(first + kTile, slots);
    for (int64_t s = first; s < last;) {
      ahead.fetch();
      for (const int64_t end = std::min(s + kSlots, last); s < end; s++, value += width) {
        KVPRESS_UNROLLED (int n = 0; n < N; n++) {
          asm volatile("" ::: "memory");  // weights are loaded again: kept in registers, they push a sum out
          Vec channel[2];
          load_pair(value + n * 2 * kWidth, channel);
          KVPRESS_UNROLLED (int m = 0; m < M; m++) {
            const Vec weight = splat(w[m * w_stride + s]);
            KVPRESS_UNROLLED (int i = 0; i < 2; i++) sums[m][2 * n + i] += weight * channel[i];
          }
        }
      }
    }
  }
  KVPRESS_UNROLLED (int m = 0; m < M; m++)
    KVPRESS_UNROLLED (int n = 0; n < 2 * N; n++) store(out + m * out_stride + n * kWidth, sums[m][n]);
}

// The same for any width; channels beyond the last whole pair of vectors one by one.
template <int M, class E>
inline void add_all_values(const float* w, int64_t w_stride, const E* const* tile, int64_t slots, int64_t width,
                           float* out, int64_t out_stride, Ahead& ahead) {
  constexpr int N = std::max(1, power_of_two_below(kSums / M) / 2);
  constexpr int kPair = 2 * kWidth;
  int64_t d = 0;
  for (; d + N * kPair <= width; d += N * kPair)
    add_values<M, N>(w, w_stride, tile, slots, d, width, out + d, out_stride, ahead);
  for (; d + kPair <= width; d += kPair)
    add_values<M, 1>(w, w_stride, tile, slots, d, width, out + d, out_stride, ahead);
  for (; d < width; d++)
    for (int m = 0; m < M; m++)
      for (int64_t s = 0; s < slots; s++)
        out[m * out_stride + d] += w[m * w_stride + s] * to_float(tile[s / kTile][s % kTile * width + d]);
}

// Puts what add_all_values made of values of this storage into the order of the channels.
template <class E>
inline void channels_in_order(const E* storage, float* out, int64_t width) {
  for (int64_t d = 0; d + 2 * kWidth <= width; d += 2 * kWidth) {
    Vec pair[2] = {load(out + d), load(out + d + kWidth)};
    in_order(storage, pair);
    store(out + d, pair[0]);
    store(out + d + kWidth, pair[1]);
  }
}

// Calls f(first, constant) for all of `queries` queries, in parts as equal as possible whose sizes are compile-time
// constants of at most kQueries.
template <int M = kQueries, class F>
inline void with_constant(int64_t queries, const F& f) {
  if constexpr (M > 1) {
    if (queries < M) return with_constant<M - 1>(queries, f);
  }
  f(std::integral_constant<int, M>{});
}
template <class F>
inline void in_parts(int64_t queries, const F& f) {
  const int64_t parts = (queries + kQueries - 1) / kQueries;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = queries * part / parts;
    with_constant(queries * (part + 1) / parts - first, [&](auto M) { f(first, M); });
  }
}

// Queries as logits_of_tile takes them: one part after the other, each [width, M]. read(m, to) reads query m.
template <class Read>
inline void pack_queries(int64_t queries, int64_t width, float* row, float* packed, const Read& read) {
  in_parts(queries, [&](int64_t first, auto M) {
    for (int m = 0; m < M; m++) {
      read(first + m, row);
      for (int64_t d = 0; d < width; d++) packed[first * width + d * M + m] = row[d];
    }
  });
}

}  // namespace kvpress::KERNEL_ISA
