// Checks of the store's pages, of the columns beside them, and of what says which slots of a row stay.
#pragma once

#include "bind.h"

namespace kvpress {
namespace {

// Pages as operators get them.
struct PageTensors {
  const Tensor &key, &value, &table, &counts;
};

// Refuses a row whose slots lie in pages that do not exist. `appends`: whether each is about to get one more slot.
void check_row(const char* op, const Pages& pages, int64_t r, int64_t count, bool appends) {
  const int64_t room = pages.table_width * pages.page_slots;
  if (count < 0 || count > room - appends)
    refuse(op, "row ", r, " holds ", count, " slots", appends ? " and gets another" : "",
           ", but table_RW has room for ", room);
  const int64_t needed = pieces(count + appends, pages.page_slots);
  uint32_t last = 0;  // a negative number is the largest of all
  for (int64_t w = 0; w < needed; w++) {
    const auto page = uint32_t(pages.table[r * pages.table_width + w]);
    last = page > last ? page : last;
  }
  if (needed > 0 && last >= pages.pages)
    refuse(op, "table_RW names page ", int32_t(last), " in row ", r, "; pages 0 to ", pages.pages - 1, " exist");
}

// Checks the pages of rows. `appends`: whether each row is about to get one more slot.
Pages pages_of(const char* op, Shapes& shapes, const PageTensors& x, bool appends) {
  shapes.bind(x.key, "key_PDS");
  shapes.bind(x.value, "value_PSE");
  shapes.bind(x.table, "table_RW");
  shapes.bind(x.counts, "counts_R");
  expect(op, x.table, "table_RW", ScalarType::Int, "int32");
  expect(op, x.counts, "counts_R", ScalarType::Long, "int64");
  expect(op, x.key, "key_PDS", x.key.scalar_type(), "");
  expect(op, x.value, "value_PSE", x.key.scalar_type(), "of the same dtype as key_PDS");
  shapes.at_least_one("RDES");
  shapes.at_most("DE", kMostWidth);
  const int64_t room = times(shapes['W'], shapes['S']);
  if (shapes['S'] > kMostSlots || room > kMostSlots)
    refuse(op, "table_RW has room for ", room, " slots in pages of ", shapes['S'], "; at most ", kMostSlots,
           " are supported");
  const Pages pages{x.key.data_ptr(),
                    x.value.data_ptr(),
                    type_of(op, x.key, "key_PDS"),
                    shapes['P'],
                    shapes['S'],
                    shapes['D'],
                    shapes['E'],
                    static_cast<const int32_t*>(x.table.data_ptr()),
                    shapes['W']};
  const auto* count = static_cast<const int64_t*>(x.counts.data_ptr());
  for (int64_t r = 0; r < shapes['R']; r++) check_row(op, pages, r, count[r], appends);
  return pages;
}

// Checks and fills what decode_rows and decode_step share.
DecodeRows rows_of(const char* op, Shapes& shapes, const Strided& query, const PageTensors& x, const Logits& logits,
                   bool appends) {
  DecodeRows a{};
  a.pages = pages_of(op, shapes, x, appends);
  const int64_t batch = shapes['B'], query_heads = shapes['N'], rows = shapes['R'];
  if (batch == 0 || rows % batch || rows == 0 || query_heads % (rows / batch))
    refuse(op, "table_RW has ", rows, " rows; query_BNQD of shape ", shape_of(query.tensor),
           " needs a multiple of B whose number of KV heads divides N");
  if (query_heads == 0) refuse(op, "query_BNQD has no heads");
  a.query = query.heads;
  a.counts = static_cast<const int64_t*>(x.counts.data_ptr());
  a.batch = batch;
  a.heads = rows / batch;
  a.group = query_heads / a.heads;
  a.logits = logits;
  return a;
}

// What is kept of every slot beside its key and value.
struct ColumnTensors {
  const Tensor& position;
  const std::optional<Tensor>& mass;
};

// Checks the columns of pages.
Columns columns_of(const char* op, Shapes& shapes, const ColumnTensors& x) {
  shapes.bind(x.position, "position_PS");
  expect(op, x.position, "position_PS", ScalarType::Int, "int32");
  if (!x.mass) return {static_cast<int32_t*>(x.position.data_ptr()), nullptr};
  shapes.bind(*x.mass, "mass_PS");
  expect(op, *x.mass, "mass_PS", ScalarType::Float, "float32");
  return {static_cast<int32_t*>(x.position.data_ptr()), static_cast<float*>(x.mass->data_ptr())};
}

struct BoundTensors {
  const Tensor &seen, &quota, &recent, &sink;
};

// Checks what says which slots stay. `least`: of seen.
Bounds bounds_of(const char* op, Shapes& shapes, const BoundTensors& x, Rank rank, int64_t least) {
  shapes.bind(x.seen, "seen_B");
  shapes.bind(x.quota, "quota_R");
  shapes.bind(x.recent, "recent_R");
  shapes.bind(x.sink, "sink_B");
  for (const Tensor* each : {&x.seen, &x.quota, &x.recent, &x.sink})
    expect(op, *each, "seen_B, quota_R, recent_R and sink_B", ScalarType::Long, "int64");
  const auto longs = [](const Tensor& each) { return static_cast<const int64_t*>(each.data_ptr()); };
  const Bounds bounds{longs(x.seen), longs(x.quota), longs(x.recent), longs(x.sink), rank};
  for (int64_t b = 0; b < shapes['B']; b++) {
    if (bounds.seen[b] < least || bounds.seen[b] > kMostSlots)
      refuse(op, "sequence ", b, " has seen ", bounds.seen[b], " tokens; ", least, " to ", kMostSlots, " are allowed");
    if (bounds.sink[b] < 0 || bounds.sink[b] > kMostSlots)
      refuse(op, "the first ", bounds.sink[b], " tokens of sequence ", b, " stay; 0 to ", kMostSlots, " are allowed");
  }
  for (int64_t r = 0; r < shapes['R']; r++)
    if (bounds.recent[r] < 0)
      refuse(op, "the last ", bounds.recent[r], " tokens of row ", r, " stay; it must not be negative");
  return bounds;
}

Rank rank_of(const char* op, const std::string& rank, bool lacks_mass) {
  const auto chosen = one_of<Rank>(op, "rank", rank, {"mass", "mass_per_age", "position"});
  if (lacks_mass && chosen != Rank::kPosition) refuse(op, "rank='", rank, "' needs mass_PS");
  return chosen;
}

// What a step reads and writes of its layer.
void add(Memory& memory, const PageTensors& pages, const ColumnTensors& columns, const BoundTensors& bounds) {
  memory.writes(pages.key, "key_PDS");
  memory.writes(pages.value, "value_PSE");
  memory.reads(pages.table, "table_RW");
  memory.writes(pages.counts, "counts_R");
  memory.writes(columns.position, "position_PS");
  if (columns.mass) memory.writes(*columns.mass, "mass_PS");
  memory.reads(bounds.seen, "seen_B");
  memory.reads(bounds.quota, "quota_R");
  memory.reads(bounds.recent, "recent_R");
  memory.reads(bounds.sink, "sink_B");
}

}  // namespace
}  // namespace kvpress
