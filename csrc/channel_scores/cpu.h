// Mean q² times mean k² of every channel. Formula: README.md.
#pragma once

#include "../decode_rows/cpu.h"

namespace kvpress::KERNEL_ISA {

class ChannelEnergy {
 public:
  explicit ChannelEnergy(const ChannelScores& a) : a_(a) {}

  void run(int64_t r) const {
    const int64_t b = r / a_.heads, h = r % a_.heads, width = Layout::up(a_.width, kTile);
    float* queries = scratch<float, struct QueryEnergy>(4 * width);
    float *keys = queries + width, *part = keys + width, *row = part + width;
    std::fill_n(queries, 4 * width, 0.0f);
    for (int64_t g = 0; g < a_.group; g++)
      for (int64_t w = 0; w < a_.queries; w++) add(a_.query, b, h * a_.group + g, w, row, queries);
    int64_t held = 0;
    for (int64_t s = 0; s < a_.slots; s++) {
      if (!a_.held[r * a_.slots + s]) continue;
      add(a_.key, b, h, s, row, part);
      if (++held % kBlock == 0) collect(part, width, keys);
    }
    collect(part, width, keys);
    const float factor = float(a_.group * a_.queries);
    for (int64_t d = 0; d < a_.width; d++)
      a_.scores[r * a_.width + d] = queries[d] / factor * (keys[d] / float(std::max<int64_t>(1, held)));
  }

 private:
  // Long sums in parts: a small number added to a large one loses its last bits.
  static void collect(float* part, int64_t width, float* sums) {
    for (int64_t d = 0; d < width; d++) sums[d] += part[d];
    std::fill_n(part, width, 0.0f);
  }

  void add(const Heads& from, int64_t b, int64_t h, int64_t i, float* row, float* sums) const {
    const int64_t offset = b * from.batch_stride + h * from.head_stride + i * from.token_stride;
    read_floats(from.data, from.type, offset, a_.width, 1.0f, row);
    for (int64_t d = 0; d < a_.width; d += kWidth) store(sums + d, load(sums + d) + load(row + d) * load(row + d));
  }

  const ChannelScores& a_;
};

inline void channel_scores(const ChannelScores& a, const Threads& threads) {
  const ChannelEnergy energy(a);
  const bool worthwhile = a.batch * a.heads * a.slots * a.width > 1 << 16;
  share(threads, a.batch * a.heads, worthwhile, [&](int64_t r) { energy.run(r); });
}

}  // namespace kvpress::KERNEL_ISA
