// What the operators of retrieval take: pages with boxes, of which a step reads some. See args.h.
#pragma once

#include "args.h"

namespace kvpress {

// Where the cells of a page's keys lie: see kvpress/formulas/page_cells.py.
struct CellPlaces {
  static constexpr int64_t kSlots = 8, kChannels = 4, kUnit = kSlots * kChannels;  // of a field of a unit
  int64_t width, slots, bits;

  int64_t quads() const { return (width + kChannels - 1) / kChannels; }
  int64_t fields() const { return 8 / bits; }
  int64_t bytes() const { return quads() * kChannels * slots * bits / 8; }
  // The byte of a slot and a channel, and where in it the number of the cell begins.
  int64_t at(int64_t s, int64_t d) const {
    return (s / (kSlots * fields()) * quads() + d / kChannels) * kUnit + s % kSlots * kChannels + d % kChannels;
  }
  int64_t shift(int64_t s) const { return s / kSlots % fields() * bits; }
};

// The pages of rows; query head g of row r is number r · group + g.
struct RowPages {
  const int32_t* table;  // [R, W]
  const int64_t* pages;  // [R]
  int64_t rows, group, table_width;
};

struct PageBounds {
  PackPages packed;
  void* box;      // [P, 2, D] of the store's type
  float* length;  // [P, 2]
  int64_t bits;   // of the number of a cell; 0: there are none
  int64_t cell_bytes;
  uint8_t* cell;  // [P, bytes]
};

struct ScorePages {
  RowPages row;
  const void *query, *box;  // [R, G, D], [P, 2, D]
  Type query_type, type;
  int64_t width;
  float* bound;  // [R, G, W]
};

struct ScoreCells {
  ScorePages of;          // `bound` is written for all places: the given one, or a tighter one
  const uint8_t* cell;    // [P, bytes]
  const int32_t* place;   // [R, W]: the places that are meant
  const int64_t* chosen;  // [R]
  const float* loose;     // [R, G, W]
  int64_t bits, slots, cell_bytes;
  float* rank;  // [R, G, W]: −∞ at other places
};

struct ChoosePages {
  RowPages row;
  const float* bound;                 // [R, G, W]
  const int32_t* span;                // [P, 2]
  const int64_t *sink, *from, *keep;  // [R]
  int32_t* place;                     // [R, W]
  int64_t* chosen;                    // [R]
};

struct MissedMass {
  RowPages row;
  const void* query;  // [R, G, D]
  Type query_type;
  int64_t width;
  const float* bound;     // [R, G, W]
  const int32_t* place;   // [R, W]
  const int64_t* chosen;  // [R]
  const float* length;    // [P, 2]
  Logits logits;
  int64_t slots;
  float *mass, *longest;  // [R, G], [R]
};

}  // namespace kvpress
