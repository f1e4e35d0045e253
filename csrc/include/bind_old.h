// Checks of old slots: how their pages lie in memory, which channels they keep, and the parts of rows that they make.
#pragma once

#include "bind.h"

namespace kvpress {
namespace {

constexpr size_t kLayoutSizes = 10, kPartTensors = 8;
constexpr int64_t kMostSize = 1 << 20;

// Sizes as they stand in kvpress/formulas/page_layout.py.
Layout layout_of(const char* op, const int64_t* sizes) {
  const auto known = [](int64_t bits) { return bits == 16 || bits == 8 || bits == 4 || bits == 2; };
  for (size_t i = 0; i < kLayoutSizes; i++)
    if (sizes[i] < 1 || sizes[i] > kMostSize)
      refuse(op, "layout: size ", i, " is ", sizes[i], "; 1 to ", kMostSize, " are allowed");
  if (!known(sizes[5]) || !known(sizes[6])) refuse(op, "layout: bits must be 16, 8, 4, 2");
  const Layout l(sizes);
  if (l.slots % (l.key_bits < 16 || l.value_bits < 16 ? 32 : 16) || l.key_group % 32 || l.slots % l.key_group ||
      l.value_group % 32)
    refuse(op,
           "layout: slots must be a multiple of 32 (16 where nothing is quantised) and of key_group, groups "
           "multiples of 32");
  const int64_t most = l.key_bits < 16 ? 2 * l.key_width : l.key_width;  // each may have two codes
  if (l.key_kept > most || l.value_kept > l.value_width || std::max(l.key_kept, l.key_width) > kMostCoded ||
      l.value_width > kMostCoded)
    refuse(op, "layout: more channels than there are, or than ", kMostCoded);
  return l;
}

// Kept channels of rows; those of rows without slots may be any that exist. They ascend; behind all of them those
// that have two codes ascend once more.
const int16_t* channels_of(const char* op, const Tensor& x, int64_t rows, int64_t kept, int64_t width,
                           const int64_t* counts = nullptr) {
  expect(op, x, "channels", ScalarType::Short, "int16");
  if (x.dim() != 2 || x.size(0) != rows || x.size(1) != kept)
    refuse(op, "channels of shape ", shape_of(x), " for ", rows, " rows and ", kept, " channels");
  const auto* channel = static_cast<const int16_t*>(x.data_ptr());
  for (int64_t r = 0; r < rows; r++, channel += kept) {
    const int64_t first = std::min(kept, width);
    // At once: there may be very many rows.
    bool ascend = channel[0] >= 0 && channel[first - 1] < width && channel[kept - 1] < width;
    for (int64_t i = 1; i < first; i++) ascend &= channel[i] > channel[i - 1];
    for (int64_t i = first + 1; i < kept; i++) ascend &= channel[i] > channel[i - 1];
    if (first < kept) ascend &= channel[first] >= 0;
    if (ascend) continue;
    for (int64_t i = 0; i < kept; i++) {
      if (channel[i] < 0 || channel[i] >= width) refuse(op, "channel ", channel[i], " of ", width);
      if (i > 0 && i != width && channel[i] <= channel[i - 1] && !(counts && counts[r] == 0))
        refuse(op, "channel ", channel[i], " after ", channel[i - 1], " in row ", r, "; channels must ascend");
    }
  }
  return static_cast<const int16_t*>(x.data_ptr());
}

// A column of old slots that may be missing; without numbers it is.
template <class T>
T* optional_of(const char* op, const Tensor& x, const char* name, ScalarType type, const char* text,
               std::initializer_list<int64_t> shape) {
  expect(op, x, name, type, text);
  if (x.numel() == 0) return nullptr;
  bool fits = size_t(x.dim()) == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++) fits = x.size(int64_t(i)) == shape.begin()[i];
  if (!fits) refuse(op, name, " of old slots has shape ", shape_of(x));
  return static_cast<T*>(x.data_ptr());
}

// Refuses old slots of a row that lie in pages that do not exist.
void check_old_row(const char* op, const Part& part, int64_t r) {
  const int64_t room = times(part.table_width, part.layout.slots), count = part.counts[r];
  if (count < 0 || count > room) refuse(op, "row ", r, " holds ", count, " old slots; its table has room for ", room);
  if (count % part.layout.slots)
    refuse(op, "row ", r, " holds ", count, " old slots; they stand in whole pages of ", part.layout.slots);
  if (part.dropped && (part.dropped[r] < 0 || part.dropped[r] > count))
    refuse(op, "row ", r, " dropped ", part.dropped[r], " of ", count, " old slots");
  const int32_t* page = part.table + r * part.table_width;
  for (int64_t w = 0; w < count / part.layout.slots; w++)
    if (page[w] < 0 || page[w] >= part.pages)
      refuse(op, "table names page ", page[w], " of old slots in row ", r, "; ", part.pages, " exist");
}

// A part of old slots, from kPartTensors tensors: see kvpress/formulas/page_layout.py.
Part part_of(const char* op, const Layout& l, const Tensor* x, int64_t rows, int64_t item) {
  expect(op, x[0], "pages", ScalarType::Byte, "uint8");
  expect(op, x[3], "table", ScalarType::Int, "int32");
  expect(op, x[4], "counts", ScalarType::Long, "int64");
  if (x[0].dim() != 2 || x[0].size(1) != l.page_bytes)
    refuse(op, "pages have shape ", shape_of(x[0]), ", not ", l.page_bytes, " bytes");
  if (x[3].dim() != 2 || x[3].size(0) != rows || x[4].dim() != 1 || x[4].size(0) != rows)
    refuse(op, "table ", shape_of(x[3]), " and counts ", shape_of(x[4]), " of old slots for ", rows, " rows");
  Part part{};
  part.layout = l;
  part.page = static_cast<uint8_t*>(x[0].data_ptr());
  if (reinterpret_cast<uintptr_t>(part.page) % uintptr_t(item))
    refuse(op, "pages begin between numbers of ", item, " bytes; copy them");
  part.pages = x[0].size(0);
  part.table = static_cast<const int32_t*>(x[3].data_ptr());
  part.table_width = x[3].size(1);
  part.counts = static_cast<const int64_t*>(x[4].data_ptr());
  part.key_channel = channels_of(op, x[1], rows, l.key_kept, l.key_width, part.counts);
  part.value_channel = channels_of(op, x[2], rows, l.value_kept, l.value_width, part.counts);
  part.position = optional_of<int32_t>(op, x[5], "position", ScalarType::Int, "int32", {part.pages, l.slots});
  part.mass = optional_of<float>(op, x[6], "mass", ScalarType::Float, "float32", {part.pages, l.slots});
  part.dropped = optional_of<int64_t>(op, x[7], "dropped", ScalarType::Long, "int64", {rows});
  for (int64_t r = 0; r < rows; r++) check_old_row(op, part, r);
  return part;
}

// Checks parts of old slots. Returns for how many slots of all kinds a row has room.
int64_t add_parts(const char* op, DecodeRows& a, const std::vector<Tensor>& old, const std::vector<int64_t>& layouts) {
  const size_t parts = layouts.size() / kLayoutSizes;
  if (layouts.size() % kLayoutSizes || old.size() != parts * kPartTensors || parts > size_t(kMostParts))
    refuse(op, old.size(), " tensors and ", layouts.size(), " sizes of old slots; each of at most ", kMostParts,
           " parts has ", kPartTensors, " and ", kLayoutSizes);
  const int64_t rows = a.batch * a.heads, item = a.pages.type == Type::kFloat32 ? 4 : 2;
  int64_t columns = times(a.pages.table_width, a.pages.page_slots);
  for (size_t i = 0; i < parts; i++) {
    const Layout l = layout_of(op, &layouts[i * kLayoutSizes]);
    if (l.key_width != a.pages.key_width || l.value_width != a.pages.value_width || l.item_bytes != item)
      refuse(op, "old slots of ", l.key_width, ", ", l.value_width, " channels and ", l.item_bytes,
             " bytes beside others");
    const Part& part = a.part[a.parts++] = part_of(op, l, &old[i * kPartTensors], rows, item);
    // Columns of weights that old slots take: see span() in kvpress/formulas/page_layout.py.
    columns = plus(columns, times(pieces(times(part.table_width, l.slots), 64), 64));
  }
  if (columns > kMostSlots)
    refuse(op, "tables have room for ", columns, " slots in all; at most ", kMostSlots, " are supported");
  return columns;
}

}  // namespace
}  // namespace kvpress
