// What PyTorch calls as kvpress::missed_mass: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor> missed_mass(const Tensor& query, const Tensor& bound, const Tensor& table,
                                       const Tensor& pages, const Tensor& place, const Tensor& chosen,
                                       const Tensor& length, double scaling, double softcap, int64_t slots) {
  const char* op = "missed_mass";
  Shapes shapes(op);
  shapes.bind(query, "query_BND");
  shapes.bind(bound, "bound_BNW");
  bind_two(op, shapes, length, "length_PX", "length_P2");
  expect(op, query, "query_BND", query.scalar_type(), "");
  expect(op, bound, "bound_BNW", ScalarType::Float, "float32");
  expect(op, length, "length_P2", ScalarType::Float, "float32");
  shapes.at_least_one("D");
  shapes.at_most("D", kMostCoded);
  if (!(scaling > 0)) refuse(op, "scaling is ", scaling, "; bounds of products are bounds of logits above 0");
  if (slots < 1 || slots > kMostSlots) refuse(op, "slots is ", slots, "; 1 to ", kMostSlots, " are allowed");
  MissedMass a{};
  a.row = row_pages_of(op, shapes, table, pages);
  shapes.bind(place, "place_RW");
  shapes.bind(chosen, "chosen_R");
  expect(op, place, "place_RW", ScalarType::Int, "int32");
  expect(op, chosen, "chosen_R", ScalarType::Long, "int64");
  a.query = query.data_ptr();
  a.query_type = type_of(op, query, "query_BND");
  a.width = shapes['D'];
  a.bound = static_cast<const float*>(bound.data_ptr());
  a.place = static_cast<const int32_t*>(place.data_ptr());
  a.chosen = static_cast<const int64_t*>(chosen.data_ptr());
  a.length = static_cast<const float*>(length.data_ptr());
  a.logits = logits_of(op, scaling, softcap);
  a.slots = slots;
  check_entries(op, "place_RW", a.place, a.chosen, a.row.rows, a.row.table_width, a.row.table_width);
  Tensor mass = empty(op, {shapes['B'], shapes['N']}, ScalarType::Float);
  Tensor longest = empty(op, {shapes['R']}, ScalarType::Float);
  a.mass = static_cast<float*>(mass.data_ptr());
  a.longest = static_cast<float*>(longest.data_ptr());
  kernels().missed_mass(a, threads());
  return {mass, longest};
}

}  // namespace
}  // namespace kvpress
