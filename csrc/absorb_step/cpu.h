// One eviction per row while decoding, merged into the slot with the nearest key. See README.md.
#pragma once

#include "../decode_step/cpu.h"

namespace kvpress::KERNEL_ISA {

template <class E>
class Absorption {
 public:
  explicit Absorption(const AbsorbStep& a) : a_(a), slots_{a.pages, a.columns} {}

  void run(const Threads& threads) {
    const int64_t rows = a_.batch * a_.heads;
    losses_ = scratch<Loss, struct Losses>(rows);
    int64_t slots = 0;
    for (int64_t r = 0; r < rows; r++) slots += a_.counts[r];
    share(threads, rows, slots * a_.width > 1 << 15, [&](int64_t r) { losses_[r] = find(r); });
    for (int64_t b = 0; b < a_.batch; b++) absorb(b);
  }

 private:
  struct Loss {
    int64_t victim, target;  // slots; -1: none
    float similarity;
  };

  Loss find(int64_t r) const {
    const int64_t count = a_.counts[r], b = r / a_.heads;
    if (count <= a_.bounds.quota[r]) return {-1, -1, 0};
    Victim victim(a_.bounds, b, r);
    alignas(64) int32_t position[kTile];
    alignas(64) float mass[kTile] = {};
    slots_.each_tile(r, count, [&](int64_t s, int64_t slots, const Place& place) {
      slots_.read_tile(r, s, slots, place, a_.columns.position, position);
      if (a_.columns.mass) slots_.read_tile(r, s, slots, place, a_.columns.mass, mass);
      for (int i = 0; i < kTile; i += kWidth) victim.consider(s + i, count, load(position + i), load(mass + i));
    });
    return victim.slot() < 0 ? Loss{-1, -1, 0} : nearest(r, count, victim.slot());
  }

  // Cosines are compared by their squares with their signs; the victim's key is scaled to length 1 before.
  Loss nearest(int64_t r, int64_t count, int64_t victim) const {
    float* key = scratch<float, struct VictimKey>(a_.width);
    float* copy = scratch<float, struct TileCopy>(a_.width * kTile);
    read_key(slots_.find(r, victim), key);
    float norm = 0;
    for (int64_t d = 0; d < a_.width; d++) norm += key[d] * key[d];
    if (!(norm < INFINITY)) return {victim, -1, -INFINITY};
    for (int64_t d = 0; d < a_.width && norm > 0; d++) key[d] /= std::sqrt(norm);
    Vec best[kVectors];
    IntVec at[kVectors];
    for (int v = 0; v < kVectors; v++) best[v] = splat(-INFINITY), at[v] = splat(int32_t(-1));
    alignas(64) int32_t position[kTile] = {};
    const int32_t first = a_.merging.sinks ? INT32_MIN : int32_t(a_.bounds.sink[r / a_.heads]);
    slots_.each_tile(r, count, [&](int64_t s, int64_t slots, const Place& place) {
      Vec dot[kVectors], square[kVectors];
      if (slots_.in_place()) {
        compare(key, slots_.key(place), a_.pages.page_slots, dot, square);
      } else {
        for (int64_t i = 0; i < kTile; i++)
          for (int64_t d = 0; d < a_.width; d++)
            copy[d * kTile + i] =
                i < slots ? to_float(slots_.key(slots_.find(r, s + i))[d * a_.pages.page_slots]) : 0.0f;
        compare(key, copy, kTile, dot, square);
      }
      slots_.read_tile(r, s, slots, place, a_.columns.position, position);
      for (int v = 0; v < kVectors; v++) {
        const Vec size = dot[v] < 0 ? -dot[v] : dot[v];
        const Vec score = square[v] == 0 ? Vec{} : dot[v] * size / square[v];
        const IntVec slot = lanes() + int32_t(s + v * kWidth);
        const IntVec better = (slot < int32_t(count)) & (slot != int32_t(victim)) &
                              (load(position + v * kWidth) >= first) & (square[v] < INFINITY) & (score > best[v]);
        best[v] = better ? score : best[v];
        at[v] = better ? slot : at[v];
      }
    });
    Loss loss{victim, -1, -INFINITY};
    for (int v = 0; v < kVectors; v++)
      for (int i = 0; i < kWidth; i++)
        if (at[v][i] >= 0 &&
            (best[v][i] > loss.similarity || (best[v][i] == loss.similarity && at[v][i] < loss.target)))
          loss.target = at[v][i], loss.similarity = best[v][i];
    loss.similarity = std::copysign(std::sqrt(std::fabs(loss.similarity)), loss.similarity);
    return loss;
  }

  // Products of a key with those of a tile, and the squares of their lengths.
  template <class T>
  void compare(const float* key, const T* tile, int64_t channel_stride, Vec* dot, Vec* square) const {
    constexpr int kParts = 2;  // sums that do not wait for each other
    Vec dots[kParts][kVectors] = {}, squares[kParts][kVectors] = {};
    const auto add = [&](int64_t d, int part) __attribute__((always_inline)) {
      Vec other[kVectors];
      load_tile(tile + d * channel_stride, other);
      KVPRESS_UNROLLED (int v = 0; v < kVectors; v++) {
        dots[part][v] += splat(key[d]) * other[v];
        squares[part][v] += other[v] * other[v];
      }
    };
    int64_t d = 0;
    for (; d + kParts <= a_.width; d += kParts)
      KVPRESS_UNROLLED (int part = 0; part < kParts; part++) add(d + part, part);
    for (; d < a_.width; d++) add(d, 0);
    for (int v = 0; v < kVectors; v++) {
      dot[v] = dots[0][v] + dots[1][v];
      square[v] = squares[0][v] + squares[1][v];
    }
    if constexpr (kVectors == 2) {
      in_order(tile, dot);
      in_order(tile, square);
    }
  }

  void absorb(int64_t b) const {
    const Loss* losses = losses_ + b * a_.heads;
    float total = 0, largest = -INFINITY;
    int64_t matched = 0;
    for (int64_t h = 0; h < a_.heads; h++) {
      if (losses[h].target < 0) continue;
      total += losses[h].similarity;
      largest = std::max(largest, losses[h].similarity);
      matched++;
    }
    float& threshold = a_.threshold[b];
    const float mean = total / float(matched);
    if (matched)
      threshold = std::isnan(threshold) ? mean
                                        : float(a_.merging.memory) * threshold +
                                              float(a_.merging.gain) * (a_.merging.largest ? largest : mean);
    for (int64_t h = 0; h < a_.heads; h++) {
      const Loss& loss = losses[h];
      const int64_t r = b * a_.heads + h;
      if (loss.target >= 0 && (a_.merging.together ? mean : loss.similarity) >= threshold) merge(r, loss);
      if (slots_.drop(r, loss.victim, a_.counts[r])) a_.counts[r]--;
    }
  }

  void merge(int64_t r, const Loss& loss) const {
    const Place from = slots_.find(r, loss.victim), to = slots_.find(r, loss.target);
    const float weight = a_.merging.normalised ? std::exp(loss.similarity) : loss.similarity;
    const float own = a_.merging.normalised ? float(a_.merging.own) : 1.0f,
                whole = a_.merging.normalised ? own + weight : 2.0f;
    const float kept_share = own / whole, lost_share = weight / whole;
    const auto add = [&](E& kept, float lost) { from_float(to_float(kept) * kept_share + lost * lost_share, &kept); };
    for (int64_t e = 0; e < a_.pages.value_width; e++) add(slots_.value(to)[e], to_float(slots_.value(from)[e]));
    const int64_t stride = a_.pages.page_slots, last = (a_.pages.key_width - 1) * stride;
    if (a_.merging.keys) {
      float* key = scratch<float, struct VictimKey>(a_.width);
      read_key(from, key);
      turn(key, float(int64_t{a_.columns.position[to.address]} - a_.columns.position[from.address]));
      for (int64_t d = 0; d < a_.width; d++) add(slots_.key(to)[d * stride], key[d]);
    }
    if (a_.merging.counts)
      from_float(std::log(std::exp(to_float(slots_.key(to)[last])) + std::exp(to_float(slots_.key(from)[last]))),
                 &slots_.key(to)[last]);
  }

  // Pairs of channels lie side by side where they are interleaved, otherwise in two halves.
  void turn(float* key, float by) const {
    const Turning& rotation = a_.turning;
    const bool beside = rotation.interleaved;
    for (int64_t f = 0; f < rotation.pairs; f++) {
      float& x = key[rotation.start + (beside ? 2 * f : f)];
      float& y = key[rotation.start + (beside ? 2 * f + 1 : rotation.pairs + f)];
      const float angle = by * rotation.frequency[f];
      const float cos = std::cos(angle), sin = std::sin(angle), turned = x * cos - y * sin;
      y = x * sin + y * cos;
      x = turned;
    }
  }

  void read_key(Place place, float* to) const {
    for (int64_t d = 0; d < a_.width; d++) to[d] = to_float(slots_.key(place)[d * a_.pages.page_slots]);
  }

  const AbsorbStep& a_;
  RowSlots<E> slots_;
  Loss* losses_ = nullptr;
};

inline void absorb_step(const AbsorbStep& a, const Threads& threads) {
  with_storage(a.pages.type, [&](auto storage) { Absorption<decltype(storage)>(a).run(threads); });
}

}  // namespace kvpress::KERNEL_ISA
