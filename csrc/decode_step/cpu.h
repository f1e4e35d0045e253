// One decode step of one layer: append a token, attend, observe, evict at most one slot of every row. See README.md.
#pragma once

#include "../decode_rows/cpu.h"
#include "../include/noise.h"
#include "../include/slots.h"

namespace kvpress::KERNEL_ISA {

// The unprotected slot with the smallest score; of equal ones the latest. A NaN is the smallest of all.
class Victim {
 public:
  // Of row r, which is one of sequence b.
  Victim(const Bounds& bounds, int64_t b, int64_t r)
      : seen_(bounds.seen[b]), sink_(int32_t(bounds.sink[b])),
        until_(int32_t(std::max<int64_t>(0, seen_ - bounds.recent[r]))), rank_(bounds.rank) {}

  // Slots slot … slot + kWidth − 1, of which those from `count` on are none.
  void consider(int64_t slot, int64_t count, IntVec position, Vec score) {
    if (rank_ == Rank::kPosition) score = __builtin_convertvector(position, Vec);
    if (rank_ == Rank::kMassPerAge) {
      const IntVec age = int32_t(seen_) - position;
      score /= __builtin_convertvector(age > 1 ? age : splat(int32_t(1)), Vec);
    }
    score = score == score ? score : splat(-INFINITY);
    const IntVec slots = lanes() + int32_t(slot);
    const IntVec allowed = (position >= sink_) & (position < until_) & (slots < int32_t(count));
    const IntVec worse = allowed & ((score < score_) | ((score == score_) & (position > position_)));
    score_ = worse ? score : score_;
    position_ = worse ? position : position_;
    slot_ = worse ? slots : slot_;
  }

  // −1 if all slots are protected.
  int64_t slot() const {
    int best = 0;
    for (int i = 1; i < kWidth; i++)
      if (score_[i] < score_[best] || (score_[i] == score_[best] && position_[i] > position_[best])) best = i;
    return slot_[best];
  }

 private:
  Vec score_ = splat(INFINITY);
  IntVec position_ = splat(int32_t(-1)), slot_ = splat(int32_t(-1));
  int64_t seen_;
  int32_t sink_, until_;
  Rank rank_;
};

template <class E>
class Step {
 public:
  static constexpr bool kJoins = true;

  // kept: without memory where no mass is kept; totals: [R, M, blocks], the sums of noisy exponentials
  Step(const DecodeStep& a, const Regions& regions, const BlockWeights& kept, float* totals)
      : a_(a), regions_(regions), slots_{a.attend.pages, a.columns}, kept_(kept), totals_(totals),
        plain_(a.noise.kind == NoiseKind::kNone && a.noise.tau == 1.0) {}

  // The new token goes behind the others of its row. Its page is read right after, by the same thread.
  void before_last_chunk(int64_t r) {
    const int64_t slot = a_.counts[r], b = r / heads(), h = r % heads();
    const Place place = slots_.find(r, slot);
    const int64_t key = b * a_.key.batch_stride + h * a_.key.head_stride;
    const int64_t value = b * a_.value.batch_stride + h * a_.value.head_stride;
    E* channel = slots_.key(place);
    for (int64_t d = 0; d < pages().key_width; d++) copy_one(a_.key, key + d, channel + d * pages().page_slots);
    for (int64_t d = 0; d < pages().value_width; d++) copy_one(a_.value, value + d, slots_.value(place) + d);
    a_.columns.position[place.address] = int32_t(a_.bounds.seen[b] - 1);
    if (a_.columns.mass) a_.columns.mass[place.address] = 0;
  }

  // Noisy attention has a softmax of its own.
  void on_logits(int64_t r, int64_t m0, int queries, int64_t begin, int64_t slots, const float* x, Ahead& ahead) {
    if (!a_.columns.mass || plain_) return;
    float top[kQueries];
    add_noise(r, m0, queries, begin, slots, x, top, ahead);
    for (int m = 0; m < queries; m++) {
      float* y = kept_.row(r, m0 + m) + begin;
      Vec total{};
      ahead.fetch();
      for (int64_t i = 0; i < slots; i += kWidth) {
        const Vec weight = top[m] == -INFINITY ? Vec{} : exp(load(y + i) - top[m]);
        total += weight;
        store(y + i, weight);
      }
      kept_.references(r, m0 + m)[begin / kBlock] = top[m];
      totals_[(r * kept_.m + m0 + m) * kept_.blocks + begin / kBlock] = sum(total);
    }
  }

  void on_weights(int64_t r, int64_t m, int64_t begin, int64_t slots, const float* x, float relative_to) {
    if (a_.columns.mass && plain_) kept_.keep(r, m, begin, slots, x, relative_to);
  }

  void after_row(int64_t r, const Regions& regions, const float* lse) {
    const int64_t count = a_.counts[r] = regions.counts[r];
    int64_t held = count;
    for (int p = 0; p < a_.attend.parts; p++) held += old(p).counts[r] - (old(p).dropped ? old(p).dropped[r] : 0);
    const bool evicts = a_.evict && held > a_.bounds.quota[r];
    if (!a_.columns.mass && !evicts) return;
    for (int64_t m = 0; m < kept_.m && a_.columns.mass; m++)
      kept_.normalise(r, m, regions, plain_ ? lse[m] : noisy_lse(r, m, regions));
    Victim victim(a_.bounds, r / heads(), r);
    alignas(64) int32_t position[kTile];
    alignas(64) float mass[kTile] = {};
    for (int p = 0; p < a_.attend.parts; p++) {
      each_old_tile(old(p), r, [&](int64_t s, int64_t address) {
        if (a_.columns.mass) observe(r, regions.begin[p] + s, old(p).mass + address);
        for (int i = 0; i < kTile && evicts; i += kWidth)
          victim.consider(regions.begin[p] + s + i, INT32_MAX, load(old(p).position + address + i),
                          a_.columns.mass ? load(old(p).mass + address + i) : Vec{});
      });
    }
    const int64_t begin = regions.begin[a_.attend.parts];
    slots_.each_tile(r, count, [&](int64_t s, int64_t slots, const Place& place) {
      slots_.read_tile(r, s, slots, place, a_.columns.position, position);
      if (a_.columns.mass) {
        slots_.read_tile(r, s, slots, place, a_.columns.mass, mass);
        observe(r, begin + s, mass);
        slots_.write_tile(r, s, slots, place, mass, a_.columns.mass);
      }
      for (int i = 0; i < kTile && evicts; i += kWidth)
        victim.consider(begin + s + i, begin + count, load(position + i), load(mass + i));
    });
    if (evicts && victim.slot() >= 0) drop(r, regions, victim.slot(), count);
  }

 private:
  const Pages& pages() const { return a_.attend.pages; }
  int64_t heads() const { return a_.attend.heads; }
  const Part& old(int p) const { return a_.attend.part[p]; }

  // Calls f(first slot, address) for every tile of old slots of a row: pages hold whole tiles.
  template <class F>
  void each_old_tile(const Part& part, int64_t r, const F& f) const {
    for (int64_t s = 0; s < part.counts[r]; s += kTile) f(s, address(part, r, s));
  }

  static int64_t address(const Part& part, int64_t r, int64_t slot) {
    const int64_t size = part.layout.slots;
    return part.table[r * part.table_width + slot / size] * size + slot % size;
  }

  // An old slot leaves a hole, which the store fills when it packs again; others move up.
  void drop(int64_t r, const Regions& regions, int64_t place, int64_t count) const {
    const int p = regions.of(place);
    if (p == a_.attend.parts) {
      a_.counts[r] = count - slots_.drop(r, place - regions.begin[p], count);
      return;
    }
    old(p).position[address(old(p), r, place - regions.begin[p])] = -1;
    old(p).dropped[r]++;
  }

  static void copy_one(const Heads& from, int64_t offset, E* to) {
    float x = 0;
    read_floats(from.data, from.type, offset, 1, 1.0f, &x);
    from_float(x, to);
  }

  // Keeps y = (x + ζ)/τ of a block, -inf beyond its slots up to a whole tile, and the largest y of each query.
  void add_noise(int64_t r, int64_t m0, int queries, int64_t begin, int64_t slots, const float* x, float* top,
                 Ahead& ahead) const {
    const Noise& o = a_.noise;
    const bool noisy = o.kind != NoiseKind::kNone;
    const int64_t of_query = o.kind == NoiseKind::kFresh ? a_.bounds.seen[r / heads()] - 1 : -1;
    const float coldness = float(1.0 / o.tau);
    const int64_t padded = (slots + kTile - 1) / kTile * kTile;
    alignas(64) int32_t position[kBlock];
    alignas(64) float noise[kBlock];
    for (int64_t s = 0; s < slots && noisy; s += kTile)
      read_positions(r, begin + s, std::min<int64_t>(kTile, slots - s), position + s);
    for (int m = 0; m < queries; m++) {
      const uint32_t row = noise_row(o.seed, o.layer, o.first + r % heads() * a_.attend.group + m0 + m, of_query);
      float* y = kept_.row(r, m0 + m) + begin;
      ahead.fetch();
      if (noisy) draw_exponential(row, position, padded, noise);
      ahead.fetch();
      Vec largest = splat(-INFINITY);
      for (int64_t s = 0; s < padded; s += kWidth) {
        Vec logit = load(x + m * kBlock + s);
        if (noisy) logit -= log(load(noise + s));
        logit *= coldness;
        largest = max(logit, largest);
        store(y + s, logit);
      }
      top[m] = max(largest);
    }
  }

  // Positions of a tile, for noise: those of dropped slots are any.
  void read_positions(int64_t r, int64_t place, int64_t slots, int32_t* to) const {
    const int p = regions_.of(place);
    const int64_t slot = place - regions_.begin[p];
    if (p < a_.attend.parts) {
      std::copy_n(old(p).position + address(old(p), r, slot), kTile, to);
    } else {
      slots_.read_tile(r, slot, slots, slots_.find(r, slot), a_.columns.position, to);
    }
  }

  float noisy_lse(int64_t r, int64_t m, const Regions& regions) const {
    const float *top = kept_.references(r, m), *total = totals_ + (r * kept_.m + m) * kept_.blocks;
    float largest = -INFINITY, all = 0;
    each_block(r, regions, [&](int64_t k) { largest = std::max(largest, top[k]); });
    each_block(r, regions,
               [&](int64_t k) { all += top[k] == -INFINITY ? 0.0f : total[k] * std::exp(top[k] - largest); });
    return largest + std::log(all);
  }

  template <class F>
  void each_block(int64_t r, const Regions& regions, const F& f) const {
    for (int p = 0; p <= a_.attend.parts; p++)
      for (int64_t s = 0; s < regions.count(r, p); s += kBlock) f((regions.begin[p] + s) / kBlock);
  }

  // mass += the weights of the query group, of one tile
  void observe(int64_t r, int64_t begin, float* mass) const {
    for (int64_t m = 0; m < kept_.m; m++) {
      const float* weights = kept_.row(r, m) + begin;
      const float factor = kept_.references(r, m)[begin / kBlock];
      for (int i = 0; i < kTile; i += kWidth) store(mass + i, load(mass + i) + load(weights + i) * factor);
    }
  }

  const DecodeStep& a_;
  const Regions& regions_;
  RowSlots<E> slots_;
  BlockWeights kept_;
  float* totals_;
  bool plain_;
};

template <class E>
void step_of(const DecodeStep& a, const Threads& threads) {
  const int64_t rows = a.attend.batch * a.attend.heads, group = a.attend.group;
  int64_t* counts = scratch<int64_t, struct Counts>(rows);
  int64_t most = 0;
  for (int64_t r = 0; r < rows; r++) most = std::max(most, counts[r] = a.counts[r] + 1);
  const Regions regions(a.attend, counts);
  const int64_t blocks = (regions.begin[a.attend.parts] + most + kBlock - 1) / kBlock, stride = blocks * kBlock;
  BlockWeights kept{nullptr, nullptr, group, stride, blocks};
  float* totals = nullptr;
  if (a.columns.mass) {
    kept.weights = scratch<float, struct StepWeights>(rows * group * stride);
    kept.reference = scratch<float, struct StepReferences>(2 * rows * group * blocks);
    totals = kept.reference + rows * group * blocks;
  }
  Step<E> step(a, regions, kept, totals);
  RowsAttention<E, Step<E>>(a.attend, regions, step).run(threads);
}

inline void decode_step(const DecodeStep& a, const Threads& threads) {
  with_storage(a.attend.pages.type, [&](auto storage) { step_of<decltype(storage)>(a, threads); });
}

}  // namespace kvpress::KERNEL_ISA
