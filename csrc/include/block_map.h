// Which blocks of a prompt are attended to, as bits.
#pragma once

#include <cstdint>

namespace kvpress {

// The bit map of blocks of a prompt: see kvpress/formulas/block_map.py.
struct BlockMap {
  static constexpr int64_t kQueries = 64, kSlots = 32, kSegment = 4, kGroups = 4;
  int64_t queries, slots;
  uint8_t* bytes;  // [B, N, X]

  int64_t rows() const { return (queries + kQueries - 1) / kQueries; }
  int64_t columns() const { return (slots + kSlots - 1) / kSlots; }
  // How many blocks of slots the queries of a row see.
  int64_t end(int64_t row) const {
    const int64_t last = ((row + 1) * kQueries + slots - queries + kSlots - 1) / kSlots;
    return last < columns() ? last : columns();
  }
  // The first block of the local area, or 0: all of it is local. The last block always is: it may not be whole.
  int64_t first_local(int64_t row, int64_t local) const {
    const int64_t last = end(row) - 1, all = (last + kSegment - 1) / kSegment, excess = all * kSegment - last;
    const int64_t least = local > kSlots ? (local - 1) / kSlots + 1 : 1;
    const int64_t segments = all - (least + excess + kSegment - 1) / kSegment;
    return segments > 0 ? 1 + segments * kSegment : 0;
  }
  // The byte at which a row of the map begins; of `rows()`: all bytes.
  int64_t offset(int64_t row) const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < row; i++) bytes += (end(i) + 7) / 8;
    return bytes;
  }
};

}  // namespace kvpress
