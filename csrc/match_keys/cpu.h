// The nearest kept key by cosine for every evicted key. Formula, bytes and numerics: README.md.
//
// Per row: kept keys that may be targets are packed once into tiles, divided by their norms. A task takes some evicted
// keys over all tiles, block by block: a block of tiles stays in L2 for all keys of the task, a tile in L1 for a few.
#pragma once

#include "../decode_rows/cpu.h"

namespace kvpress::KERNEL_ISA {

constexpr int kMatched = 4 * kQueries;                 // evicted keys that a tile serves before the next one
constexpr int64_t kMatchTask = 8 * kMatched;           // of a task, at most
constexpr int64_t kMatchSlots = 128;                   // of a block, between two looks at the largest cosine
constexpr int64_t kMatchStride = kMatchSlots + kTile;  // no power of two: it would put all keys into few cache sets
constexpr int64_t kPackedTiles = 16;                   // of a task of packing

class RowMatch {
 public:
  RowMatch(const MatchKeys& a, int64_t b, int64_t h, const Threads& threads)
      : a_(a), b_(b), h_(h), row_(b * a.heads + h), threads_(threads) {}

  void run() {
    slot_ = scratch<int64_t, struct MatchedSlots>(a_.kept);
    count_ = 0;
    for (int64_t c = 0; c < a_.kept; c++)
      if (a_.allowed[row_ * a_.kept + c]) slot_[count_++] = c;
    padded_ = (count_ + kTile - 1) / kTile * kTile;
    tiles_ = scratch<float, struct MatchedTiles>(padded_ * a_.width);
    const bool worthwhile = a_.evicted * count_ * a_.width > 1 << 16;
    const int64_t tiles = padded_ / kTile;
    share(threads_, (tiles + kPackedTiles - 1) / kPackedTiles, worthwhile, [&](int64_t i) {
      for (int64_t t = i * kPackedTiles; t < std::min(tiles, (i + 1) * kPackedTiles); t++) pack(t);
    });
    // Whole blocks: how many keys are multiplied together, and with it rounding, must not depend on the threads.
    const int64_t blocks = (a_.evicted + kMatched - 1) / kMatched;
    const int64_t step = kMatched * std::clamp<int64_t>(blocks / (4 * threads_.count), 1, kMatchTask / kMatched);
    share(threads_, (a_.evicted + step - 1) / step, worthwhile,
          [&](int64_t i) { match(i * step, std::min(a_.evicted, (i + 1) * step)); });
  }

 private:
  // 1/|key| from |key|²: 0 where that is 0, NaN where it is not finite. No comparison picks a NaN.
  static float inverse_norm(float squares) {
    return squares == 0 ? 0 : squares < INFINITY ? 1 / std::sqrt(squares) : NAN;
  }

  void read_key(const Heads& keys, int64_t i, float* to) const {
    const int64_t offset = b_ * keys.batch_stride + h_ * keys.head_stride + i * keys.token_stride;
    read_floats(keys.data, keys.type, offset, a_.width, 1.0f, to);
  }

  void read_unit_evicted(int64_t e, float* to) const {
    read_key(a_.evicted_key, e, to);
    Vec sums{};
    int64_t d = 0;
    for (; d + kWidth <= a_.width; d += kWidth) sums += load(to + d) * load(to + d);
    float squares = sum(sums);
    for (; d < a_.width; d++) squares += to[d] * to[d];
    const float factor = inverse_norm(squares);
    for (d = 0; d < a_.width; d++) to[d] *= factor;
  }

  // One tile of kept keys, NaN beyond the last one. Norms are taken of all its keys at a time: for few evicted keys,
  // packing is most of the work.
  void pack(int64_t t) const {
    float* key = scratch<float, struct MatchedKey>(a_.width);
    float* tile = tiles_ + t * kTile * a_.width;
    for (int64_t i = 0; i < kTile; i++) {
      if (t * kTile + i < count_)
        read_key(a_.kept_key, slot_[t * kTile + i], key);
      else
        std::fill_n(key, a_.width, NAN);
      for (int64_t d = 0; d < a_.width; d++) tile[d * kTile + i] = key[d];
    }
    Vec squares[kVectors] = {}, factor[kVectors];
    for (int64_t d = 0; d < a_.width; d++)
      KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) {
        const Vec x = load(tile + d * kTile + v * kWidth);
        squares[v] += x * x;
      }
    for (int i = 0; i < kTile; i++) factor[i / kWidth][i % kWidth] = inverse_norm(squares[i / kWidth][i % kWidth]);
    for (int64_t d = 0; d < a_.width; d++)
      KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) {
        float* x = tile + d * kTile + v * kWidth;
        store(x, load(x) * factor[v]);
      }
  }

  // Some evicted keys and the best of the slots so far, as a packed one.
  struct Block {
    int64_t count;
    const float* keys;  // as logits_of_tile takes them
    float* largest;
    int64_t* best;
  };

  void match(int64_t begin, int64_t end) const {
    float* key = scratch<float, struct EvictedKey>(a_.width);
    float* keys = scratch<float, struct EvictedKeys>(kMatchTask * a_.width);
    float* largest = a_.similarity + row_ * a_.evicted;
    int64_t* best = a_.target + row_ * a_.evicted;
    const auto block_of = [&](int64_t e) {
      return Block{std::min<int64_t>(kMatched, end - e), keys + (e - begin) * a_.width, largest + e, best + e};
    };
    for (int64_t e = begin; e < end; e += kMatched)
      pack_queries(block_of(e).count, a_.width, key, keys + (e - begin) * a_.width,
                   [&](int64_t i, float* to) { read_unit_evicted(e + i, to); });
    std::fill(largest + begin, largest + end, -INFINITY);
    std::fill(best + begin, best + end, -1);
    for (int64_t s = 0; s < padded_; s += kMatchSlots)
      for (int64_t e = begin; e < end; e += kMatched) look(block_of(e), s, std::min(kMatchSlots, padded_ - s));
    for (int64_t e = begin; e < end; e++)
      if (best[e] >= 0) best[e] = slot_[best[e]];
  }

  // Cosines with one block of slots. The search for the index is rare: most blocks hold no larger one.
  void look(const Block& some, int64_t first, int64_t slots) const {
    alignas(64) float x[kMatched * kMatchStride];
    for (int64_t s = 0; s < slots; s += kTile)
      in_parts(some.count, [&](int64_t m, auto M) {
        Ahead nothing;
        logits_of_tile<M()>(some.keys + m * a_.width, tiles_ + (first + s) * a_.width, kTile, a_.width,
                            x + m * kMatchStride + s, kMatchStride, nothing);
      });
    for (int64_t i = 0; i < some.count; i++) {
      const float* cosine = x + i * kMatchStride;
      Vec tops = splat(-INFINITY);
      for (int64_t s = 0; s < slots; s += kWidth) tops = max(load(cosine + s), tops);
      const float top = max(tops);
      if (!(top > some.largest[i])) continue;
      some.largest[i] = top;
      some.best[i] = first + (std::find(cosine, cosine + slots, top) - cosine);
    }
  }

  const MatchKeys& a_;
  int64_t b_, h_, row_;
  const Threads& threads_;
  int64_t* slot_;  // of every packed key
  int64_t count_, padded_;
  float* tiles_;
};

inline void match_keys(const MatchKeys& a, const Threads& threads) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++) RowMatch(a, b, h, threads).run();
}

}  // namespace kvpress::KERNEL_ISA
