// How much attention the pages that are not read can hold at most. Formula and slack: README.md.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

class PagesMissed {
 public:
  explicit PagesMissed(const MissedMass& a) : a_(a), width_(a.row.table_width) {
    const double unit = 2.0 * double(a.width) * 0x1p-24;
    error_ = float(unit / (1 - unit));
    extra_ = float(std::log(double(a.slots)) + 0x1p-14 + double(width_) * 0x1p-24);
  }

  void run(int64_t r) const {
    const int64_t held = a_.row.pages[r], padded = (held + kWidth - 1) / kWidth * kWidth;
    auto* missed = scratch<int32_t, struct AreMissed>(padded);
    auto* length = scratch<float, struct KeyLengths>(padded);
    auto* logit = scratch<float, struct MissedLogits>(padded);
    a_.longest[r] = find(r, held, padded, missed, length);
    for (int64_t g = 0; g < a_.row.group; g++) {
      const int64_t head = r * a_.row.group + g;
      a_.mass[head] = mass(a_.bound + head * width_, error_ * norm(head), held, missed, length, logit);
    }
  }

 private:
  // Which pages are missed, and how long their keys are. Returns the length of their longest value.
  float find(int64_t r, int64_t held, int64_t padded, int32_t* missed, float* length) const {
    const int32_t *table = a_.row.table + r * width_, *place = a_.place + r * width_;
    std::fill_n(missed, held, -1);
    std::fill(missed + held, missed + padded, 0);
    std::fill(length + held, length + padded, 0.0f);
    for (int64_t i = 0; i < a_.chosen[r]; i++)
      if (place[i] < held) missed[place[i]] = 0;
    float longest = 0;
    for (int64_t w = 0; w < held; w++) {
      const float* two = a_.length + int64_t(table[w]) * 2;
      length[w] = two[0];
      const float value = missed[w] ? two[1] : 0.0f;
      if (!(value <= longest) && longest == longest) longest = value;  // what is no number stays
    }
    return longest;
  }

  float norm(int64_t head) const {
    float total = 0;
    with_storage(a_.query_type, [&](auto storage) {
      const auto* from = static_cast<const decltype(storage)*>(a_.query) + head * a_.width;
      Vec squares{};
      int64_t d = 0;
      for (; d + kWidth <= a_.width; d += kWidth) squares += load(from + d) * load(from + d);
      total = sum(squares);
      for (; d < a_.width; d++) total += to_float(from[d]) * to_float(from[d]);
    });
    return std::sqrt(total);
  }

  // ln of a bound of the sum of exponentials.
  float mass(const float* bound, float error, int64_t held, const int32_t* missed, const float* length,
             float* logit) const {
    const float scaling = float(a_.logits.scaling), cap = float(a_.logits.softcap);
    Vec most = splat(-INFINITY);
    for (int64_t w = 0; w < held; w += kWidth) {
      Vec x = load_some(bound + w, held - w, 0.0f);
      x = capped((x + load(length + w) * error) * scaling, cap);
      x += magnitude(x) * 0x1p-20f;
      x = x <= FLT_MAX ? x : splat(FLT_MAX);  // neither infinite nor no number, of which nothing could be said
      x = load(missed + w) ? x : splat(-INFINITY);
      store(logit + w, x);
      most = max(x, most);
    }
    const float top = max(most);
    if (top == -INFINITY) return top;
    Vec total{};
    for (int64_t w = 0; w < held; w += kWidth) total += exp(load(logit + w) - top);
    return top + (std::log(sum(total)) + extra_);
  }

  const MissedMass& a_;
  const int64_t width_;
  float error_;  // of a product with a key, relative to both lengths
  float extra_;  // of a sum of exponentials: ln of slots, and what rounding may take
};

inline void missed_mass(const MissedMass& a, const Threads& threads) {
  const PagesMissed pages(a);
  const bool worthwhile = a.row.rows * a.row.table_width * a.row.group > 1 << 13;
  share(threads, a.row.rows, worthwhile, [&](int64_t r) { pages.run(r); });
}

}  // namespace kvpress::KERNEL_ISA
