// Where the slots of a row are counted: parts of old slots first, then the pages of the store's own numbers.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/tiles.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kBlock = 64;  // slots between two looks at the running maximum; their keys and values fit in L1

// The places of slots in what is kept per slot: parts of old slots first, each from a multiple of kBlock on, then the
// pages of the store's own numbers.
struct Regions {
  const DecodeRows& a;
  const int64_t* counts;  // slots of every row in the last region, as the queries see them
  int64_t begin[kMostParts + 2];

  Regions(const DecodeRows& a, const int64_t* counts) : a(a), counts(counts) {
    begin[0] = 0;
    for (int p = 0; p < a.parts; p++) begin[p + 1] = begin[p] + Layout::up(room(p), kBlock);
  }

  int64_t count(int64_t r, int p) const { return p < a.parts ? a.part[p].counts[r] : counts[r]; }

  // For how many slots a region has room.
  int64_t room(int p) const {
    return p < a.parts ? a.part[p].table_width * a.part[p].layout.slots : a.pages.table_width * a.pages.page_slots;
  }

  // Which region a place is in.
  int of(int64_t place) const {
    int p = 0;
    while (p < a.parts && place >= begin[p + 1]) p++;
    return p;
  }
};

// Slots of one task.
struct Chunk {
  int64_t row;
  int region;
  int64_t begin;

  bool operator==(const Chunk& other) const {
    return row == other.row && region == other.region && begin == other.begin;
  }
};

}  // namespace kvpress::KERNEL_ISA
