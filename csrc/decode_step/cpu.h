// One decode step of one layer: append a token, attend, observe, evict at most one slot of every row. See README.md.
#pragma once

#include "../decode_rows/cpu.h"
#include "../include/noise.h"

namespace kvpress::KERNEL_ISA {

template <class E>
class Step {
 public:
  // logits_stride: a multiple of kTile
  Step(const DecodeStep& a, int64_t logits_stride) : a_(a), logits_stride_(logits_stride) {}

  // The new token goes behind the others of its row. Its page is read right after, by the same thread.
  void before_last_chunk(int64_t r) {
    const int64_t slot = a_.counts[r], b = r / heads(), h = r % heads();
    const Place place = find(r, slot);
    const int64_t key = b * a_.key.batch_stride + h * a_.key.head_stride;
    const int64_t value = b * a_.value.batch_stride + h * a_.value.head_stride;
    E* channel = key_of(place);
    for (int64_t d = 0; d < pages().key_width; d++) copy_one(a_.key, key + d, channel + d * pages().page_slots);
    for (int64_t d = 0; d < pages().value_width; d++) copy_one(a_.value, value + d, value_of(place) + d);
    a_.position[place.address] = int32_t(a_.seen[b] - 1);
    if (a_.mass) a_.mass[place.address] = 0;
  }

  void after_row(int64_t r, int64_t count, const float* lse, float* logits) {
    const int64_t padded = (count + kTile - 1) / kTile * kTile;
    a_.counts[r] = count;
    const bool evicts = a_.evict && count > a_.quota[r];
    if (!logits && !evicts) return;
    int32_t* position = scratch<int32_t, struct Positions>(padded);
    read_column(r, count, a_.position, position);
    std::fill(position + count, position + padded, -1);
    float* mass = nullptr;
    if (a_.mass) {
      mass = scratch<float, struct Masses>(padded);
      read_column(r, count, a_.mass, mass);
      std::fill(mass + count, mass + padded, 0.0f);
    }
    if (logits) {
      observe(r, count, padded, lse, logits, position, mass);
      write_column(r, count, mass, a_.mass);
    }
    if (evicts) evict(r, count, victim(r, count, position, mass));
  }

 private:
  struct Place {
    int64_t page, offset, address;
  };

  const Pages& pages() const { return a_.attend.pages; }
  int64_t heads() const { return a_.attend.heads; }

  Place find(int64_t r, int64_t slot) const {
    const int64_t page = pages().table[r * pages().table_width + slot / pages().page_slots];
    const int64_t offset = slot % pages().page_slots;
    return {page, offset, page * pages().page_slots + offset};
  }
  E* key_of(Place p) const { return static_cast<E*>(pages().key) + p.page * pages().key_width * pages().page_slots + p.offset; }
  E* value_of(Place p) const { return static_cast<E*>(pages().value) + p.address * pages().value_width; }

  static void copy_one(const Heads& from, int64_t offset, E* to) {
    float x = 0;
    read_floats(from.data, from.type, offset, 1, 1.0f, &x);
    from_float(x, to);
  }

  template <class T>
  void read_column(int64_t r, int64_t count, const T* column, T* to) const {
    for (int64_t s = 0; s < count; s += pages().page_slots)
      std::copy_n(column + find(r, s).address, std::min(pages().page_slots, count - s), to + s);
  }
  template <class T>
  void write_column(int64_t r, int64_t count, const T* from, T* column) const {
    for (int64_t s = 0; s < count; s += pages().page_slots)
      std::copy_n(from + s, std::min(pages().page_slots, count - s), column + find(r, s).address);
  }

  // mass += the softmax of the (noisy) logits, summed over the query group
  void observe(int64_t r, int64_t count, int64_t padded, const float* lse, float* logits, const int32_t* position,
               float* mass) const {
    const Observation& o = a_.observation;
    for (int64_t g = 0; g < a_.attend.group; g++) {
      float* x = logits + g * logits_stride_;
      std::fill(x + count, x + padded, -INFINITY);
      if (o.noise == Noise::kNone && o.tau == 1.0) {
        for (int64_t s = 0; s < padded; s += kWidth) store(mass + s, load(mass + s) + exp(load(x + s) - lse[g]));
        continue;
      }
      const int64_t query = o.noise == Noise::kFresh ? a_.seen[r / heads()] - 1 : -1;
      const uint32_t row = noise_row(o.seed, o.layer, r % heads() * a_.attend.group + g, query);
      const float coldness = float(1.0 / o.tau);
      Vec top = splat(-INFINITY);
      for (int64_t s = 0; s < padded; s += kWidth) {
        Vec y = load(x + s);
        if (o.noise != Noise::kNone) y -= log(exponential(row, bits_as<IntVec>(load(reinterpret_cast<const float*>(position + s)))));
        y *= coldness;
        top = max(y, top);
        store(x + s, y);
      }
      const float largest = max(top);
      Vec total{};
      for (int64_t s = 0; s < padded; s += kWidth) {
        const Vec weight = exp(load(x + s) - largest);
        total += weight;
        store(x + s, weight);
      }
      const float scale = 1.0f / sum(total);
      for (int64_t s = 0; s < padded; s += kWidth) store(mass + s, load(mass + s) + load(x + s) * scale);
    }
  }

  // The unprotected slot with the smallest score; of equal ones the latest. A NaN is the smallest of all.
  int64_t victim(int64_t r, int64_t count, const int32_t* position, const float* mass) const {
    const int64_t seen = a_.seen[r / heads()], protected_from = std::max<int64_t>(0, seen - a_.recent[r / heads()]);
    int64_t worst = -1;
    float lowest = 0;
    for (int64_t s = 0; s < count; s++) {
      const int64_t p = position[s];
      if (p < a_.sink || p >= protected_from) continue;
      float score = a_.rank == Rank::kPosition ? float(p) : mass[s];
      if (a_.rank == Rank::kMassPerAge) score /= float(std::max<int64_t>(1, seen - p));
      if (score != score) score = -INFINITY;
      if (worst < 0 || score < lowest || (score == lowest && p > position[worst])) {
        worst = s;
        lowest = score;
      }
    }
    return worst;
  }

  // The last slot of the row takes the place of the victim.
  void evict(int64_t r, int64_t count, int64_t slot) const {
    if (slot < 0) return;
    const Place to = find(r, slot), from = find(r, count - 1);
    for (int64_t d = 0; d < pages().key_width; d++)
      key_of(to)[d * pages().page_slots] = key_of(from)[d * pages().page_slots];
    std::copy_n(value_of(from), pages().value_width, value_of(to));
    a_.position[to.address] = a_.position[from.address];
    if (a_.mass) a_.mass[to.address] = a_.mass[from.address];
    a_.counts[r] = count - 1;
  }

  const DecodeStep& a_;
  int64_t logits_stride_;
};

template <class E>
void step_of(const DecodeStep& a, const Threads& threads) {
  const int64_t rows = a.attend.batch * a.attend.heads;
  int64_t* counts = scratch<int64_t, struct Counts>(rows);
  int64_t most = 0;
  for (int64_t r = 0; r < rows; r++) most = std::max(most, counts[r] = a.counts[r] + 1);
  const int64_t stride = (most + kTile - 1) / kTile * kTile;
  float* logits = a.mass ? scratch<float, struct StepLogits>(rows * a.attend.group * stride) : nullptr;
  Step<E> step(a, stride);
  RowsAttention<E, Step<E>>(a.attend, counts, logits, stride, step).run(threads);
}

inline void decode_step(const DecodeStep& a, const Threads& threads) {
  with_storage(a.attend.pages.type, [&](auto storage) { step_of<decltype(storage)>(a, threads); });
}

}  // namespace kvpress::KERNEL_ISA
