// Where the slots of a row are, and how they are read, written and dropped.
#pragma once

#include <algorithm>

#include "args.h"
#include "tiles.h"

namespace kvpress::KERNEL_ISA {

struct Place {
  int64_t page, offset, address;  // address: page · S + offset
};

template <class E>
struct RowSlots {
  const Pages& pages;
  Columns columns;

  Place find(int64_t r, int64_t slot) const {
    const int64_t page = pages.table[r * pages.table_width + slot / pages.page_slots];
    const int64_t offset = slot % pages.page_slots;
    return {page, offset, page * pages.page_slots + offset};
  }
  E* key(Place p) const { return static_cast<E*>(pages.key) + p.page * pages.key_width * pages.page_slots + p.offset; }
  E* value(Place p) const { return static_cast<E*>(pages.value) + p.address * pages.value_width; }

  // Whether a tile lies in one page.
  bool in_place() const { return pages.page_slots % kTile == 0; }

  // Calls f(first slot, slots, place) for every tile of a row; the place is that of the first slot where tiles lie in
  // one page, otherwise anything.
  template <class F>
  void each_tile(int64_t r, int64_t count, const F& f) const {
    Place place = count ? find(r, 0) : Place{};
    for (int64_t s = 0, w = 0; s < count; s += kTile) {
      f(s, std::min<int64_t>(kTile, count - s), place);
      place.address += kTile;
      place.offset += kTile;
      if (place.offset >= pages.page_slots && s + kTile < count) {
        place.page = pages.table[r * pages.table_width + ++w];
        place.offset = 0;
        place.address = place.page * pages.page_slots;
      }
    }
  }

  template <class T>
  void read_tile(int64_t r, int64_t begin, int64_t slots, const Place& place, const T* column, T* to) const {
    if (in_place()) {
      std::copy_n(column + place.address, kTile, to);
    } else {
      for (int64_t i = 0; i < slots; i++) to[i] = column[find(r, begin + i).address];
    }
  }
  template <class T>
  void write_tile(int64_t r, int64_t begin, int64_t slots, const Place& place, const T* from, T* column) const {
    if (in_place()) {
      std::copy_n(from, kTile, column + place.address);
    } else {
      for (int64_t i = 0; i < slots; i++) column[find(r, begin + i).address] = from[i];
    }
  }

  // The last slot of a row of `count` takes the place of one; false if there is none to drop.
  bool drop(int64_t r, int64_t slot, int64_t count) const {
    if (slot < 0) return false;
    const Place to = find(r, slot), from = find(r, count - 1);
    for (int64_t d = 0; d < pages.key_width; d++) key(to)[d * pages.page_slots] = key(from)[d * pages.page_slots];
    std::copy_n(value(from), pages.value_width, value(to));
    columns.position[to.address] = columns.position[from.address];
    if (columns.mass) columns.mass[to.address] = columns.mass[from.address];
    return true;
  }
};

}  // namespace kvpress::KERNEL_ISA
