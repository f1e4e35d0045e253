// Attention of new queries over every chunk of ragged paged rows by itself. Formula: README.md.
#pragma once

#include "../decode_rows/cpu.h"

namespace kvpress::KERNEL_ISA {

// Writes what RowsAttention finds in a chunk, instead of joining it with the others of its row.
class ChunkResults {
 public:
  static constexpr bool kJoins = false;

  // kept: without memory where no weights are wanted
  ChunkResults(const DecodeRows& a, const Regions& regions, const BlockWeights& kept)
      : a_(a), regions_(regions), kept_(kept), items_(a.batch * a.heads * kept.m) {
    first_[0] = 0;
    for (int p = 0; p <= a.parts; p++) first_[p + 1] = first_[p] + (regions.room(p) + kChunk - 1) / kChunk;
    for (int64_t r = 0; r < a.batch * a.heads; r++) clear_rest(r);
  }

  void before_last_chunk(int64_t) {}
  void on_logits(int64_t, int64_t, int, int64_t, int64_t, const float*, Ahead&) {}
  void on_weights(int64_t r, int64_t m, int64_t begin, int64_t slots, const float* x, float relative_to) {
    if (kept_.weights) kept_.keep(r, m, begin, slots, x, relative_to);
  }

  void after_chunk(const Chunk& chunk, const float* records, int64_t record) const {
    const int64_t slots = std::min(kChunk, regions_.count(chunk.row, chunk.region) - chunk.begin);
    const int64_t place = regions_.begin[chunk.region] + chunk.begin;
    for (int64_t m = 0; m < kept_.m; m++) {
      const int64_t item = item_of(first_[chunk.region] + chunk.begin / kChunk, chunk.row, m);
      const float lse = a_.lse[item] = join_records(records + m * record, 1, record, a_.pages.value_width, out(item));
      if (!kept_.weights) continue;
      kept_.normalise(chunk.row, m, place, slots, lse);
      kept_.weigh(chunk.row, m, place, place + slots);
    }
  }

 private:
  int64_t item_of(int64_t j, int64_t r, int64_t m) const { return j * items_ + r * kept_.m + m; }
  float* out(int64_t item) const { return static_cast<float*>(a_.out) + item * a_.pages.value_width; }

  // Chunks that a row does not reach have seen nothing.
  void clear_rest(int64_t r) const {
    for (int p = 0; p <= a_.parts; p++) {
      for (int64_t j = first_[p] + (regions_.count(r, p) + kChunk - 1) / kChunk; j < first_[p + 1]; j++) {
        std::fill_n(out(item_of(j, r, 0)), kept_.m * a_.pages.value_width, 0.0f);
        std::fill_n(a_.lse + item_of(j, r, 0), kept_.m, -INFINITY);
      }
    }
    for (int64_t m = 0; m < kept_.m && kept_.weights; m++) kept_.clear_rest(r, m, regions_);
  }

  const DecodeRows& a_;
  const Regions& regions_;
  BlockWeights kept_;
  int64_t items_, first_[kMostParts + 2];  // the first chunk of every region
};

inline void attend_parts(const DecodeRows& a, const Threads& threads) {
  const Regions regions(a, a.counts);
  ChunkResults results(a, regions, returned_weights(a, regions));
  with_storage(a.pages.type,
               [&](auto storage) { RowsAttention<decltype(storage), ChunkResults>(a, regions, results).run(threads); });
}

}  // namespace kvpress::KERNEL_ISA
