// What PyTorch calls as kvpress::score_cells: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"
#include "../score_pages/bind.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> score_cells(const Tensor& query, const Tensor& box, const Tensor& cell, const Tensor& table,
                                       const Tensor& pages, const Tensor& place, const Tensor& chosen,
                                       const Tensor& loose, int64_t bits, int64_t slots) {
  const char* op = "score_cells";
  Shapes shapes(op);
  ScoreCells a{scored_pages(op, shapes, query, box, table, pages), nullptr, nullptr, nullptr, nullptr, bits, slots,
               cell_bytes_of(op, shapes['D'], slots, bits),        nullptr};
  shapes.bind(cell, "cell_PY");
  shapes.bind(place, "place_RW");
  shapes.bind(chosen, "chosen_R");
  shapes.bind(loose, "bound_BNW");
  expect(op, cell, "cell_PY", ScalarType::Byte, "uint8");
  expect(op, place, "place_RW", ScalarType::Int, "int32");
  expect(op, chosen, "chosen_R", ScalarType::Long, "int64");
  expect(op, loose, "bound_BNW", ScalarType::Float, "float32");
  if (shapes['Y'] != a.cell_bytes) refuse(op, "cell_PY has ", shapes['Y'], " bytes for each page, not ", a.cell_bytes);
  a.cell = static_cast<const uint8_t*>(cell.data_ptr());
  a.place = static_cast<const int32_t*>(place.data_ptr());
  a.chosen = static_cast<const int64_t*>(chosen.data_ptr());
  a.loose = static_cast<const float*>(loose.data_ptr());
  check_entries(op, "place_RW", a.place, a.chosen, a.of.row.rows, a.of.row.table_width, a.of.row.table_width);
  Tensor rank = empty(op, {shapes['B'], shapes['N'], shapes['W']}, ScalarType::Float);
  Tensor bound = empty(op, {shapes['B'], shapes['N'], shapes['W']}, ScalarType::Float);
  a.rank = static_cast<float*>(rank.data_ptr());
  a.of.bound = static_cast<float*>(bound.data_ptr());
  kernels().score_cells(a, threads());
  return {rank, bound};
}

}  // namespace
}  // namespace kvpress
