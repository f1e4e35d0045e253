// What kernels of whole prompts share: keys and values of a row as the products read them, and exponentials.
#pragma once

#include <algorithm>

#include "storage.h"
#include "tasks.h"
#include "tiles.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kPanel = 2 * kWidth;  // channels of values that lie side by side

// Keys of one KV head in tiles, values in panels: channels p·kPanel … of all slots, so that loops over slots read
// neighbouring memory. One at a time: the memory is kept between calls.
class PackedRow {
 public:
  PackedRow(const Heads& key, const Heads& value, int64_t b, int64_t h, int64_t slots, int64_t width,
            int64_t value_width)
      : tiles((slots + kTile - 1) / kTile), panels((value_width + kPanel - 1) / kPanel), keys_(key), values_(value),
        b_(b), h_(h), slots_(slots), width_(width), value_width_(value_width) {
    key_ = scratch<float, struct Keys>(tiles * kTile * width);
    value_ = scratch<float, struct Values>(tiles * kTile * panels * kPanel);
  }

  const int64_t tiles, panels;

  void pack(const Threads& threads, bool worthwhile) {
    constexpr int64_t kTogether = 16;
    share(threads, (tiles + kTogether - 1) / kTogether, worthwhile, [&](int64_t i) {
      for (int64_t s = i * kTogether * kTile; s < std::min(tiles, (i + 1) * kTogether) * kTile; s++) pack_slot(s);
    });
  }

  const float* tile(int64_t t) const { return key_ + t * kTile * width_; }
  const float* panel(int64_t p, int64_t slot) const { return value_ + (p * tiles * kTile + slot) * kPanel; }

 private:
  void pack_slot(int64_t s) {
    float* slot = scratch<float, struct Slot>(std::max(width_, panels * kPanel));
    const bool inside = s < slots_;
    if (inside) read_slot(keys_, s, width_, slot);
    float* tile = key_ + s / kTile * kTile * width_ + s % kTile;
    for (int64_t d = 0; d < width_; d++) tile[d * kTile] = inside ? slot[d] : 0.0f;
    std::fill_n(slot, panels * kPanel, 0.0f);
    if (inside && panels) read_slot(values_, s, value_width_, slot);
    for (int64_t p = 0; p < panels; p++)
      std::copy_n(slot + p * kPanel, kPanel, value_ + (p * tiles * kTile + s) * kPanel);
  }

  void read_slot(const Heads& heads, int64_t s, int64_t width, float* to) const {
    read_floats(heads.data, heads.type, b_ * heads.batch_stride + h_ * heads.head_stride + s * heads.token_stride,
                width, 1.0f, to);
  }

  Heads keys_, values_;
  int64_t b_, h_, slots_, width_, value_width_;
  float *key_, *value_;
};

// The byte at which every row of a map begins, and all bytes of a head.
template <class Tag>
inline const int64_t* map_row_offsets(const BlockMap& map) {
  int64_t* offset = scratch<int64_t, Tag>(map.rows() + 1);
  offset[0] = 0;
  for (int64_t i = 0; i < map.rows(); i++) offset[i + 1] = offset[i] + (map.end(i) + 7) / 8;
  return offset;
}

// Of a multiple of kWidth logits.
inline float largest_of(const float* x, int64_t slots) {
  Vec top = load(x);
  for (int64_t s = kWidth; s < slots; s += kWidth) top = max(load(x + s), top);
  return max(top);
}

// to = exp(x − top); returns the sum.
inline float exponentials(const float* x, int64_t slots, float top, float* to) {
  if (top == -INFINITY) {
    std::fill_n(to, slots, 0.0f);
    return 0;
  }
  Vec sums{};
  for (int64_t s = 0; s < slots; s += kWidth) {
    const Vec weight = exp(load(x + s) - top);
    sums += weight;
    store(to + s, weight);
  }
  return sum(sums);
}

}  // namespace kvpress::KERNEL_ISA
