// The box of the keys of pages, the cells that they are in, and how long keys and values can be. What is rounded where: README.md.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../include/codes.h"
#include "../include/retrieval.h"
#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

// The least and the largest of some numbers; both are none where one of those is.
struct Ends {
  float low = INFINITY, high = -INFINITY, none = 0;

  void add(float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    none = x != x ? x : none;
  }
  Ends found() const { return none != none ? Ends{none, none, none} : *this; }
};

// E: the storage of boxes, and of numbers that are not quantised.
template <class E>
class PageBoxes {
 public:
  explicit PageBoxes(const PageBounds& a) : a_(a), l_(a.packed.layout) {}

  void run(int64_t p) const {
    const uint8_t* page = a_.packed.page + p * l_.page_bytes;
    E* box = static_cast<E*>(a_.box) + p * 2 * l_.key_width;
    std::memset(box, 0, size_t(2 * l_.key_width) * sizeof(E));
    const int16_t* channel = a_.packed.key_channel + p * l_.key_kept;
    float length[2] = {0, 0};  // squared
    const auto put = [&](int64_t c, const Ends& found) {
      const Ends ends = found.found();
      E *low = box + channel[c], *high = low + l_.key_width;
      round(ends.low, -1, low);
      round(ends.high, 1, high);
      const float x = std::abs(to_float(*low)), y = std::abs(to_float(*high)), far = x < y ? y : x;
      length[0] += far * far;
    };
    l_.key_bits == 16 ? stored_keys(page, put) : coded_keys(page, put);
    l_.value_bits == 16 ? stored_values(page, length + 1) : coded_values(page, length + 1);
    for (int i = 0; i < 2; i++) a_.length[2 * p + i] = std::sqrt(length[i]) * (1 + 0x1p-14f);
    if (a_.bits) put_cells(page, channel, box, a_.cell + p * a_.cell_bytes);
  }

 private:
  // The nearest number of the storage that is not below x (sign = 1) or not above it (sign = -1).
  static void round(float x, int sign, E* to) {
    from_float(x, to);
    if constexpr (sizeof(E) == 2) {
      const float near = to_float(*to);
      if (sign > 0 ? !(near < x) : !(near > x)) return;
      const int32_t bits = to->bits, order = (bits & 0x8000 ? -(bits & 0x7FFF) : bits) + sign;
      to->bits = uint16_t(order < 0 ? -order | 0x8000 : order);
    }
  }

  // The numbers of the cells of all keys, where they lie: page_cells.py.
  void put_cells(const uint8_t* page, const int16_t* channel, const E* box, uint8_t* cell) const {
    std::memset(cell, 0, size_t(a_.cell_bytes));
    float* keys = scratch<float, struct KeysOfChannel>(l_.slots);
    const CellPlaces places{l_.key_width, l_.slots, a_.bits};
    const float parts = float(1 << a_.bits);
    for (int64_t c = 0; c < l_.key_kept; c++) {
      const int64_t d = channel[c];
      const float low = to_float(box[d]), per = parts / (to_float(box[l_.key_width + d]) - low);
      if (!(per <= FLT_MAX)) continue;  // no extent, or no number: all are in the first cell
      keys_of_channel(page, c, keys);
      for (int64_t s = 0; s < l_.slots; s++) {
        const float part = (keys[s] - low) * per;
        if (part >= 1) cell[places.at(s, d)] |= uint8_t(int(std::min(part, parts - 1)) << places.shift(s));
      }
    }
  }

  void keys_of_channel(const uint8_t* page, int64_t c, float* keys) const {
    if (l_.key_bits == 16) return read_floats(page, a_.packed.type, c * l_.slots, l_.slots, 1.0f, keys);
    const auto* scale = reinterpret_cast<const Float16*>(page + l_.key_scales) + c;
    for (int64_t s = 0; s < l_.slots; s++) {
      const Float16* step = scale + s / l_.key_group * 2 * l_.key_kept;
      const float code = one_code(page, c / 2 * (l_.slots / kLines) + s / kLines, s % kLines * 2 + c % 2, l_.key_bits);
      keys[s] = code * to_float(*step) + to_float(step[l_.key_kept]);
    }
  }

  // What is no number stays the largest.
  static void raise(float x, float* largest) {
    if (!(x <= *largest) && *largest == *largest) *largest = x;
  }

  template <class Put>
  void stored_keys(const uint8_t* page, const Put& put) const {
    const E* from = reinterpret_cast<const E*>(page);
    for (int64_t c = 0; c < l_.key_kept; c++, from += l_.slots) {
      Vec least = splat(-INFINITY), most = least, none{};  // `least` with the other sign
      for (int64_t s = 0; s < l_.slots; s += kWidth) {
        const Vec x = load(from + s);
        least = max(-x, least);
        most = max(x, most);
        none = x == x ? none : x;
      }
      put(c, Ends{-max(least), max(most), sum(none)});
    }
  }

  // With its step and zero a code is a number that grows or falls with it: those of the ends are the ends.
  template <class Put>
  void coded_keys(const uint8_t* page, const Put& put) const {
    const auto* scale = reinterpret_cast<const Float16*>(page + l_.key_scales);
    const int64_t blocks = l_.slots / kLines, together = l_.key_group / kLines;
    for (int64_t c = 0; c < l_.key_kept; c += 2) {
      Ends ends[2];
      for (int64_t g = 0; g * together < blocks; g++) {
        int low[kVector], high[kVector] = {};
        std::fill_n(low, kVector, 255);
        for (int64_t j = g * together; j < (g + 1) * together; j++)
          each_code(page, c / 2 * blocks + j, l_.key_bits, [&](int i, int code) {
            low[i] = std::min(low[i], code);
            high[i] = std::max(high[i], code);
          });
        for (int64_t i = 0; i < std::min<int64_t>(2, l_.key_kept - c); i++) {
          const Float16* step = scale + g * 2 * l_.key_kept + c + i;
          for (int64_t k = i; k < kVector; k += 2)
            for (const int code : {low[k], high[k]})
              ends[i].add(float(code) * to_float(*step) + to_float(step[l_.key_kept]));
        }
      }
      for (int64_t i = 0; i < std::min<int64_t>(2, l_.key_kept - c); i++) put(c + i, ends[i]);
    }
  }

  // Calls f with every code of a vector.
  template <class F>
  static void each_code(const uint8_t* codes, int64_t vector, int64_t bits, const F& f) {
    const int64_t fields = 16 / bits;
    const int shift = int(vector % fields * bits), mask = (1 << bits) - 1;
    uint16_t word[kVector];
    std::memcpy(word, codes + vector / fields * kUnitBytes, sizeof word);
    for (int i = 0; i < kVector; i++) f(i, word[i] >> shift & mask);
  }

  void stored_values(const uint8_t* page, float* longest) const {
    const E* from = reinterpret_cast<const E*>(page + l_.value_codes);
    for (int64_t s = 0; s < l_.slots; s++, from += l_.value_kept) {
      Vec squares{};
      int64_t u = 0;
      for (; u + kWidth <= l_.value_kept; u += kWidth) squares += load(from + u) * load(from + u);
      float total = sum(squares);
      for (; u < l_.value_kept; u++) total += to_float(from[u]) * to_float(from[u]);
      raise(total, longest);
    }
  }

  void coded_values(const uint8_t* page, float* longest) const {
    const auto* scale = reinterpret_cast<const Float16*>(page + l_.value_scales);
    const uint8_t* codes = page + l_.value_codes;
    const int64_t vectors = (l_.value_kept + kLines - 1) / kLines, together = l_.value_group / kLines;
    for (int64_t s = 0; s < l_.slots; s += 2) {
      float squares[kVector] = {};
      for (int64_t v = 0; v < vectors; v++) {
        const Float16 *step = scale + v / together * l_.slots + s, *zero = step + l_.value_groups * l_.slots;
        const float steps[2] = {to_float(step[0]), to_float(step[1])};
        const float zeros[2] = {to_float(zero[0]), to_float(zero[1])};
        const int64_t real = 2 * std::min(kLines, l_.value_kept - v * kLines);
        float x[kVector];
        each_code(codes, s / 2 * vectors + v, l_.value_bits,
                  [&](int i, int code) { x[i] = float(code) * steps[i % 2] + zeros[i % 2]; });
        for (int64_t i = 0; i < real; i++) squares[i] += x[i] * x[i];
      }
      for (int64_t i = 0; i < 2; i++) {
        float total = 0;
        for (int64_t k = i; k < kVector; k += 2) total += squares[k];
        raise(total, longest);
      }
    }
  }

  const PageBounds& a_;
  const Layout& l_;
};

inline void page_bounds(const PageBounds& a, const Threads& threads) {
  with_storage(a.packed.type, [&](auto storage) {
    const PageBoxes<decltype(storage)> boxes(a);
    const Layout& l = a.packed.layout;
    const bool worthwhile = a.packed.pages * l.slots * (l.key_width + l.value_width) > 1 << 16;
    share(threads, a.packed.pages, worthwhile, [&](int64_t p) { boxes.run(p); });
  });
}

}  // namespace kvpress::KERNEL_ISA
