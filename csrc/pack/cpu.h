// Packing and unpacking of whole pages of old slots. What codes and scales are: README.md.
#pragma once

#include <cmath>

#include "../decode_rows/cpu.h"
#include "../include/codes.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

// The next fp16 number above (sign = 1) or below (sign = -1).
inline Float16 next_half(Float16 x, int sign) {
  const int32_t bits = x.bits, order = (bits & 0x8000 ? -(bits & 0x7FFF) : bits) + sign;
  return {uint16_t(order < 0 ? -order | 0x8000 : order)};
}

inline Float16 half_towards(float x, int sign) {
  Float16 half;
  from_float(x, &half);
  return (to_float(half) - x) * float(sign) < 0 ? next_half(half, sign) : half;
}

// Codes of `count` numbers, `stride` apart: code i goes to bits i·step … of `to`, by `put`.
template <class Put>
inline void quantise(const float* x, int64_t stride, int64_t count, int64_t bits, Float16* step, Float16* zero,
                     const Put& put) {
  float low = x[0], high = x[0];
  for (int64_t i = 1; i < count; i++) {
    low = std::min(low, x[i * stride]);
    high = std::max(high, x[i * stride]);
  }
  const float levels = float((1 << bits) - 1);
  *zero = half_towards(low, -1);
  const float from = to_float(*zero), exact = (high - from) / levels;
  *step = half_towards(exact, 1);
  const float divisor = to_float(*step) == 0 ? 1.0f : to_float(*step);
  for (int64_t i = 0; i < count; i++) {
    const float code = std::nearbyint((x[i * stride] - from) / divisor);
    put(i, uint8_t(code > 0 ? std::min(code, levels) : 0.0f));  // no number: 0
  }
}

class PagePacking {
 public:
  explicit PagePacking(const PackPages& a) : a_(a), l_(a.layout) {}

  void pack(int64_t p) const {
    uint8_t* page = a_.page + p * l_.page_bytes;
    std::memset(page, 0, size_t(l_.page_bytes));
    pack_keys(p, page);
    pack_values(p, page);
  }

  void unpack(int64_t p) const {
    const uint8_t* page = a_.page + p * l_.page_bytes;
    float* row = scratch<float, struct UnpackedRow>(l_.slots * std::max(l_.key_width, l_.value_width));
    unpack_keys(p, page, row);
    write_floats(row, l_.slots * l_.key_width, const_cast<void*>(a_.key), a_.type, p * l_.slots * l_.key_width);
    unpack_values(p, page, row);
    write_floats(row, l_.slots * l_.value_width, const_cast<void*>(a_.value), a_.type, p * l_.slots * l_.value_width);
  }

 private:
  void pack_keys(int64_t p, uint8_t* page) const {
    const int16_t* channel = a_.key_channel + p * l_.key_kept;
    float* keys = scratch<float, struct PackedKeys>(l_.slots * l_.key_width);
    read_floats(a_.key, a_.type, p * l_.slots * l_.key_width, l_.slots * l_.key_width, 1.0f, keys);
    auto* scale = reinterpret_cast<Float16*>(page + l_.key_scales);
    for (int64_t c = 0; c < l_.key_kept; c++) {
      const float* from = keys + channel[c];
      if (l_.key_bits == 16) {
        for (int64_t s = 0; s < l_.slots; s++)
          write_floats(from + s * l_.key_width, 1, page, a_.type, c * l_.slots + s);
        continue;
      }
      for (int64_t g = 0; g < l_.slots / l_.key_group; g++) {
        Float16* step = scale + g * 2 * l_.key_kept + c;
        quantise(from + g * l_.key_group * l_.key_width, l_.key_width, l_.key_group, l_.key_bits, step,
                 step + l_.key_kept, [&](int64_t i, uint8_t code) {
                   const int64_t s = g * l_.key_group + i;
                   set_code(page, c / 2 * (l_.slots / kLines) + s / kLines, s % kLines * 2 + c % 2, l_.key_bits, code);
                 });
      }
    }
  }

  void pack_values(int64_t p, uint8_t* page) const {
    const int16_t* channel = a_.value_channel + p * l_.value_kept;
    float* values = scratch<float, struct PackedKeys>(l_.slots * l_.value_width);
    read_floats(a_.value, a_.type, p * l_.slots * l_.value_width, l_.slots * l_.value_width, 1.0f, values);
    alignas(64) float kept[256];
    auto* scale = reinterpret_cast<Float16*>(page + l_.value_scales);
    for (int64_t s = 0; s < l_.slots; s++) {
      for (int64_t u = 0; u < l_.value_kept; u++) kept[u] = values[s * l_.value_width + channel[u]];
      uint8_t* codes = page + l_.value_codes;
      if (l_.value_bits == 16) {
        write_floats(kept, l_.value_kept, codes, a_.type, s * l_.value_kept);
        continue;
      }
      for (int64_t g = 0; g < l_.value_groups; g++) {
        const int64_t first = g * l_.value_group, count = std::min(l_.value_group, l_.value_kept - first);
        Float16* step = scale + g * l_.slots + s;
        quantise(kept + first, 1, count, l_.value_bits, step, step + l_.value_groups * l_.slots,
                 [&](int64_t i, uint8_t code) {
                   const int64_t u = first + i;
                   set_code(codes, s / 2 * value_vectors() + u / kLines, u % kLines * 2 + s % 2, l_.value_bits, code);
                 });
      }
    }
  }

  void unpack_keys(int64_t p, const uint8_t* page, float* row) const {
    const int16_t* channel = a_.key_channel + p * l_.key_kept;
    const auto* scale = reinterpret_cast<const Float16*>(page + l_.key_scales);
    std::fill_n(row, l_.slots * l_.key_width, 0.0f);
    for (int64_t c = 0; c < l_.key_kept; c++) {
      float* to = row + channel[c];
      if (l_.key_bits == 16) {
        for (int64_t s = 0; s < l_.slots; s++)
          read_floats(page, a_.type, c * l_.slots + s, 1, 1.0f, to + s * l_.key_width);
        continue;
      }
      for (int64_t s = 0; s < l_.slots; s++) {
        const Float16* step = scale + s / l_.key_group * 2 * l_.key_kept + c;
        const float code =
            one_code(page, c / 2 * (l_.slots / kLines) + s / kLines, s % kLines * 2 + c % 2, l_.key_bits);
        const float number = code * to_float(*step) + to_float(step[l_.key_kept]);
        if (c < l_.key_width)
          to[s * l_.key_width] = number;
        else
          to[s * l_.key_width] += number;  // the second code of a channel
      }
    }
  }

  void unpack_values(int64_t p, const uint8_t* page, float* row) const {
    const int16_t* channel = a_.value_channel + p * l_.value_kept;
    const auto* scale = reinterpret_cast<const Float16*>(page + l_.value_scales);
    std::fill_n(row, l_.slots * l_.value_width, 0.0f);
    for (int64_t s = 0; s < l_.slots; s++) {
      float* to = row + s * l_.value_width;
      const uint8_t* codes = page + l_.value_codes;
      for (int64_t u = 0; u < l_.value_kept; u++) {
        if (l_.value_bits == 16) {
          read_floats(codes, a_.type, s * l_.value_kept + u, 1, 1.0f, to + channel[u]);
          continue;
        }
        const Float16* step = scale + u / l_.value_group * l_.slots + s;
        const float code = one_code(codes, s / 2 * value_vectors() + u / kLines, u % kLines * 2 + s % 2, l_.value_bits);
        to[channel[u]] = code * to_float(*step) + to_float(step[l_.value_groups * l_.slots]);
      }
    }
  }

  // Of a pair of slots.
  int64_t value_vectors() const { return (l_.value_kept + kLines - 1) / kLines; }

  const PackPages& a_;
  const Layout& l_;
};

inline void pack_pages(const PackPages& a, const Threads& threads) {
  const PagePacking packing(a);
  const bool worthwhile = a.pages * a.layout.slots * (a.layout.key_width + a.layout.value_width) > 1 << 14;
  share(threads, a.pages, worthwhile, [&](int64_t p) { a.unpack ? packing.unpack(p) : packing.pack(p); });
}

}  // namespace kvpress::KERNEL_ISA
