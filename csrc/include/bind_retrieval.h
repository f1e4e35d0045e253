// Checks of rows of which some pages are read.
#pragma once

#include "bind.h"
#include "retrieval.h"

namespace kvpress {
namespace {

// Refuses rows whose first `counts` entries name what is not among `exist`.
void check_entries(const char* op, const char* name, const int32_t* entry, const int64_t* counts, int64_t rows,
                   int64_t width, int64_t exist) {
  for (int64_t r = 0; r < rows; r++, entry += width) {
    if (counts[r] < 0 || counts[r] > width)
      refuse(op, "row ", r, " has ", counts[r], " entries in ", name, "; 0 to ", width, " are allowed");
    bool inside = true;
    for (int64_t w = 0; w < counts[r]; w++) inside &= entry[w] >= 0 && entry[w] < exist;
    if (!inside) refuse(op, name, " names in row ", r, " what is not among ", exist);
  }
}

// The pages of rows; B, N and P must be bound.
RowPages row_pages_of(const char* op, Shapes& shapes, const Tensor& table, const Tensor& pages) {
  shapes.bind(table, "table_RW");
  shapes.bind(pages, "pages_R");
  expect(op, table, "table_RW", ScalarType::Int, "int32");
  expect(op, pages, "pages_R", ScalarType::Long, "int64");
  shapes.at_least_one("BNR");
  const int64_t batch = shapes['B'], rows = shapes['R'], heads = shapes['N'];
  if (rows % batch || heads % (rows / batch))
    refuse(op, heads, " query heads of ", batch, " sequences do not share ", rows, " rows");
  const RowPages made{static_cast<const int32_t*>(table.data_ptr()), static_cast<const int64_t*>(pages.data_ptr()),
                      rows, heads / (rows / batch), shapes['W']};
  check_entries(op, "table_RW", made.table, made.pages, rows, made.table_width, shapes['P']);
  return made;
}

// A tensor [P, 2, …] of two ends or lengths of every page; `lettered` has X in the place of the 2.
void bind_two(const char* op, Shapes& shapes, const Tensor& x, const char* lettered, const char* name) {
  shapes.bind(x, lettered);
  if (shapes['X'] != 2) refuse(op, name, " has shape ", shape_of(x), "; every page has 2");
}

// Bytes of a page of the numbers of cells.
int64_t cell_bytes_of(const char* op, int64_t width, int64_t slots, int64_t bits) {
  if (bits != 2 && bits != 4) refuse(op, "bits is ", bits, "; 2 and 4 are allowed, and 0 for no cells");
  if (slots < 1 || slots % 32) refuse(op, "pages of ", slots, " slots; cells need multiples of 32");
  return CellPlaces{width, slots, bits}.bytes();
}

}  // namespace
}  // namespace kvpress
