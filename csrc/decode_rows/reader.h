// Where the slots of rows lie in memory.
#pragma once

#include "../include/tasks.h"
#include "regions.h"

namespace kvpress::KERNEL_ISA {

// The tiles of at most kBlock slots.
template <class E>
struct Block {
  int64_t slots = 0;
  const E *key[kBlock / kTile], *value[kBlock / kTile];
};

// Where slots lie in memory, and what of it is fetched while something else is computed.
template <class E>
class Reader {
 public:
  Reader(const DecodeRows& a, const int64_t* counts)
      : a_(a), counts_(counts), width_(a.pages.key_width), value_width_(a.pages.value_width) {}

  // Whether tiles lie in one page.
  bool in_place() const { return a_.pages.page_slots % kTile == 0; }

  // Where the tiles of a block lie: in the pages, or in a copy where pages do not hold whole tiles.
  Block<E> find_tiles(int64_t r, int64_t begin) const {
    Block<E> block;
    block.slots = std::min(kBlock, counts_[r] - begin);
    const int64_t page_slots = a_.pages.page_slots;
    const int32_t* table = a_.pages.table + r * a_.pages.table_width;
    const auto* keys = static_cast<const E*>(a_.pages.key);
    const auto* values = static_cast<const E*>(a_.pages.value);
    if (in_place()) {
      for (int64_t t = 0; t * kTile < block.slots; t++) {
        const int64_t slot = begin + t * kTile, page = table[slot / page_slots], offset = slot % page_slots;
        block.key[t] = keys + page * page_slots * width_ + offset;
        block.value[t] = values + (page * page_slots + offset) * value_width_;
      }
      return block;
    }
    E* copy = scratch<E, struct Copies>(kBlock * (width_ + value_width_));
    for (int64_t i = 0, run; i < block.slots; i += run) {  // neighbours in a page and in a tile together
      const int64_t slot = begin + i, page = table[slot / page_slots], offset = slot % page_slots;
      run = std::min({page_slots - offset, kTile - i % kTile, block.slots - i});
      E* tile = copy + i / kTile * kTile * width_ + i % kTile;
      const E* from = keys + page * width_ * page_slots + offset;
      if (run == kTile / 2) {  // of a known length, which is one load and one store
        for (int64_t d = 0; d < width_; d++) std::copy_n(from + d * page_slots, kTile / 2, tile + d * kTile);
      } else {
        for (int64_t d = 0; d < width_; d++) std::copy_n(from + d * page_slots, run, tile + d * kTile);
      }
      std::copy_n(values + (page * page_slots + offset) * value_width_, run * value_width_,
                  copy + kBlock * width_ + i * value_width_);
    }
    for (int64_t t = 0; t * kTile < block.slots; t++) {
      block.key[t] = copy + t * kTile * width_;
      block.value[t] = copy + kBlock * width_ + t * kTile * value_width_;
    }
    return block;
  }

  void fetch(const Block<E>& next, Ahead& ahead) const {
    if (next.slots <= 0) return;
    const int64_t tiles = (next.slots + kTile - 1) / kTile, item = sizeof(E);
    const int64_t step = std::max<int64_t>(kLine, a_.pages.page_slots * item);  // of the channels of a tile of keys
    for (int i = 0; i < Ahead::kPlaces; i++) {
      const int64_t t = std::min<int64_t>(i, tiles - 1);
      ahead.keys(i, next.key[t], step, a_.pages.page_slots * width_ * item / step);
      ahead.values(i, next.value[t], kLine, kTile * value_width_ * item / kLine);
    }
  }

  // Meanwhile what is read next is fetched, a piece of it during each of `pieces` blocks, from kLines places at a time.
  void fetch(Chunk next, int64_t piece, int64_t pieces, Ahead& ahead) const {
    if (next.region == a_.parts) {
      if (in_place() && piece == 0) fetch(find_tiles(next.row, next.begin), ahead);
      return;
    }
    const Part& part = a_.part[next.region];
    const int64_t size = part.layout.slots, pages = span_of(part) / size, places = Ahead::kLines / pages;
    const int64_t lines = part.layout.page_bytes / (kLine * places * pieces) + 1;
    for (int64_t i = 0, k = 0; k < pages; k++, next.begin += size) {
      if (next.begin >= part.counts[next.row]) next.begin -= size;  // the last page once more
      const uint8_t* from = page_of(part, next.row, next.begin) + piece * lines * kLine;
      for (int64_t j = 0; j < places; j++, i++, from += pieces * lines * kLine) ahead.place(int(i), from, kLine, lines);
    }
  }

  const uint8_t* page_of(const Part& part, int64_t r, int64_t slot) const {
    return part.page + part.table[r * part.table_width + slot / part.layout.slots] * part.layout.page_bytes;
  }

  // Slots of neighbouring pages that are fetched together: a block, or a page that lasts for several.
  static int64_t span_of(const Part& part) { return std::max(part.layout.slots, kBlock); }

  // Calls f(page, offset in it, slots, slots before) for the pages of some neighbouring slots.
  template <class F>
  void each_page(const Part& part, int64_t r, int64_t begin, int64_t slots, const F& f) const {
    for (int64_t i = 0; i < slots;) {
      const int64_t offset = (begin + i) % part.layout.slots, take = std::min(part.layout.slots - offset, slots - i);
      f(page_of(part, r, begin + i), offset, take, i);
      i += take;
    }
  }

 private:
  const DecodeRows& a_;
  const int64_t* counts_;
  int64_t width_, value_width_;
};

}  // namespace kvpress::KERNEL_ISA
