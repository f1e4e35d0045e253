// What PyTorch calls as kvpress::search_pages: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"
#include "args.h"

namespace kvpress {
namespace {

struct SearchTensors {
  const Tensor &query, &box, &table, &pages, &tree, &state, &span, &sink, &from, &keep;
};

// Checks dtypes, and that no other operand lies where the states are written.
void check_tensors(const char* op, const SearchTensors& x) {
  expect(op, x.query, "query_BND", x.query.scalar_type(), "");
  expect(op, x.box, "box_P2D", x.box.scalar_type(), "");
  expect(op, x.tree, "tree_RX2D", x.box.scalar_type(), "of the same dtype as box_P2D");
  expect(op, x.span, "span_P2", ScalarType::Int, "int32");
  expect(op, x.state, "state_RX", ScalarType::Char, "int8");
  Memory memory(op);
  memory.writes(x.state, "state_RX");
  for (const Tensor* each : {&x.sink, &x.from, &x.keep})
    expect(op, *each, "sink_R, from_R and keep_R", ScalarType::Long, "int64");
  for (const Tensor* each : {&x.query, &x.box, &x.table, &x.pages, &x.tree, &x.span, &x.sink, &x.from, &x.keep})
    memory.reads(*each, "another operand");
  memory.check();
}

SearchPages searched(const char* op, Shapes& shapes, const SearchTensors& x) {
  shapes.bind(x.query, "query_BND");
  bind_two(op, shapes, x.box, "box_PXD", "box_P2D");
  bind_two(op, shapes, x.span, "span_PX", "span_P2");
  bind_two(op, shapes, x.tree, "tree_RKXD", "tree_RX2D");
  shapes.bind(x.state, "state_RK");
  for (const Tensor* each : {&x.sink, &x.from, &x.keep}) shapes.bind(*each, "sink, from and keep_R");
  shapes.at_least_one("D");
  shapes.at_most("D", kMostCoded);
  const RowPages row = row_pages_of(op, shapes, x.table, x.pages);
  shapes.at_most("W", PageTree::kMostPlaces);
  check_tensors(op, x);
  const int64_t inner = PageTree(row.table_width).nodes() - row.table_width;
  if (shapes['K'] != inner)
    refuse(op, "state_RX has ", shapes['K'], " nodes; a row of ", row.table_width, " places has ", inner);
  const auto longs = [](const Tensor& each) { return static_cast<const int64_t*>(each.data_ptr()); };
  SearchPages a{};
  a.score = {row,
             x.query.data_ptr(),
             x.box.data_ptr(),
             type_of(op, x.query, "query_BND"),
             type_of(op, x.box, "box_P2D"),
             shapes['D'],
             nullptr};
  a.choose.row = row;
  a.choose.span = static_cast<const int32_t*>(x.span.data_ptr());
  a.choose.sink = longs(x.sink);
  a.choose.from = longs(x.from);
  a.choose.keep = longs(x.keep);
  a.tree = x.tree.data_ptr();
  a.state = static_cast<int8_t*>(x.state.data_ptr());
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> search_pages(const Tensor& query, const Tensor& box, const Tensor& table,
                                                        const Tensor& pages, const Tensor& tree, const Tensor& state,
                                                        const Tensor& span, const Tensor& sink, const Tensor& from,
                                                        const Tensor& keep) {
  const char* op = "search_pages";
  Shapes shapes(op);
  SearchPages a = searched(op, shapes, {query, box, table, pages, tree, state, span, sink, from, keep});
  Tensor place = empty(op, {shapes['R'], shapes['W']}, ScalarType::Int);
  Tensor chosen = empty(op, {shapes['R']}, ScalarType::Long), boxes = empty(op, {shapes['R']}, ScalarType::Long);
  Tensor bound = empty(op, {shapes['B'], shapes['N'], shapes['W']}, ScalarType::Float);
  a.choose.place = static_cast<int32_t*>(place.data_ptr());
  a.choose.chosen = static_cast<int64_t*>(chosen.data_ptr());
  a.boxes = static_cast<int64_t*>(boxes.data_ptr());
  a.score.bound = static_cast<float*>(bound.data_ptr());
  kernels().search_pages(a, threads());
  return {place, chosen, bound, boxes};
}

}  // namespace
}  // namespace kvpress
