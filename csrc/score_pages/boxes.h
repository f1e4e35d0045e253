// Bounds of products of queries with the keys of boxes. Formula, and why rounding cannot break it: README.md.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tiles.h"

namespace kvpress::KERNEL_ISA {

// Boxes [2, D] of storage E, their least numbers first.
template <class E>
class BoxBounds {
 public:
  explicit BoxBounds(int64_t width) : width_(width), whole_(width / kPair * kPair), stride_(Layout::up(width, kPair)) {}

  int64_t stride() const { return stride_; }  // numbers from one ordered query to the next

  // Queries [count, D] with their channels as load_pair gives those of boxes, and zeros after them.
  void order(const void* from, Type type, int64_t count, float* to) const {
    with_storage(type, [&](auto storage) { order(static_cast<const decltype(storage)*>(from), count, to); });
  }

  void fetch(const E* box) const {
    const char* from = reinterpret_cast<const char*>(box);
    for (int64_t i = 0; i < 2 * width_ * int64_t(sizeof(E)); i += kLine) __builtin_prefetch(from + i);
  }

  // The bounds of ordered queries over two boxes, which may be the same: of query m at bound[i][m · apart].
  // Every bound is the same number wherever its box stands; a NaN stays one.
  void pair(const float* query, int64_t queries, const E* const (&box)[2], float* const (&bound)[2],
            int64_t apart) const {
    E rest[2][2][kPair];
    if (whole_ < width_)
      for (int i = 0; i < 2; i++) copy_rest(box[i], rest[i]);
    for (int64_t m = 0; m < queries; m += kHeads)
      with_constant<kHeads>(std::min<int64_t>(kHeads, queries - m), [&](auto M) {
        float* const at[2] = {bound[0] + m * apart, bound[1] + m * apart};
        score<M()>(query + m * stride_, box, rest, at, apart);
      });
  }

 private:
  static constexpr int kPair = 2 * kWidth;                 // numbers of load_pair
  static constexpr int kHeads = kRegisters == 32 ? 8 : 4;  // queries whose sums stay in registers

  // The last channels of both ends, and zeros, which add nothing.
  void copy_rest(const E* low, E (*rest)[kPair]) const {
    std::memset(rest, 0, 2 * kPair * sizeof(E));
    for (int i = 0; i < 2; i++) std::copy(low + i * width_ + whole_, low + (i + 1) * width_, rest[i]);
  }

  // For every channel the end of the box that gives the larger product, in one chain of sums for every lane.
  template <int M>
  void score(const float* query, const E* const (&box)[2], const E (&rest)[2][2][kPair], float* const (&bound)[2],
             int64_t apart) const {
    Vec sums[2][M] = {};
    for (int64_t d = 0; d < whole_; d += kPair) {
      const E* const at[2] = {box[0] + d, box[1] + d};
      add<0>(query + d, at, width_, sums);
      add<1>(query + d, at, width_, sums);
    }
    if (whole_ < width_) {
      const E* const at[2] = {rest[0][0], rest[1][0]};
      add<0>(query + whole_, at, kPair, sums);
      add<1>(query + whole_, at, kPair, sums);
    }
    KVPRESS_UNROLLED (int i = 0; i < 2; i++)
      KVPRESS_UNROLLED (int m = 0; m < M; m++) bound[i][m * apart] = sum(sums[i][m]);
  }

  // Some channels of both boxes, whose upper ends stand `apart` numbers behind the lower ones.
  template <int I, int M>
  __attribute__((always_inline)) void add(const float* query, const E* const (&box)[2], int64_t apart,
                                          Vec (&sums)[2][M]) const {
    Vec low[2], high[2];
    KVPRESS_UNROLLED (int i = 0; i < 2; i++) {
      low[i] = load_half<I>(box[i]);
      high[i] = load_half<I>(box[i] + apart);
    }
    KVPRESS_UNROLLED (int m = 0; m < M; m++) {
      const Vec x = load(query + m * stride_ + I * kWidth);
      KVPRESS_UNROLLED (int i = 0; i < 2; i++) sums[i][m] += x * by_sign(x, low[i], high[i]);
    }
  }

  template <class Q>
  void order(const Q* from, int64_t count, float* to) const {
    E number[kPair];
    for (int i = 0; i < kPair; i++) from_float(float(i), number + i);
    Vec pair[2];
    load_pair(number, pair);  // channels by their places
    float channel[kPair];
    for (int i = 0; i < 2; i++) store(channel + i * kWidth, pair[i]);
    for (int64_t n = 0; n < count; n++, from += width_)
      for (int64_t d = 0; d < stride_; d += kPair, to += kPair) {
        if (std::is_same_v<Q, E> && d < whole_) {
          load_pair(from + d, pair);
          for (int i = 0; i < 2; i++) store(to + i * kWidth, pair[i]);
          continue;
        }
        for (int i = 0; i < kPair; i++) {
          const int64_t c = d + int64_t(channel[i]);
          to[i] = c < width_ ? to_float(from[c]) : 0.0f;
        }
      }
  }

  const int64_t width_, whole_, stride_;  // whole_: channels in whole pairs of vectors
};

}  // namespace kvpress::KERNEL_ISA
