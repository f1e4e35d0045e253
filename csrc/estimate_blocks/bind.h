// What PyTorch calls as kvpress::estimate_blocks: checks, allocation, the kernel.
#pragma once

#include "../include/bind_maps.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Sums of products of larger codes would not fit either.
void check_codes(const char* op, const Tensor& x, const char* name) {
  const auto* code = static_cast<const int8_t*>(x.data_ptr());
  int8_t least = 0, most = 0;
  for (int64_t i = 0; i < x.numel(); i++) {
    least = std::min(least, code[i]);
    most = std::max(most, code[i]);
  }
  if (least < -7 || most > 7)
    refuse(op, name, " holds codes from ", int(least), " to ", int(most), "; -7 to 7 are allowed");
}

Tensor estimate_blocks(Tensor query, Tensor query_scale, Tensor key, Tensor key_scale, Tensor shift, Tensor threshold,
                       int64_t local) {
  const char* op = "estimate_blocks";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  shapes.bind(query_scale, "query_scale_BNQ");
  shapes.bind(key, "key_BHSD");
  shapes.bind(key_scale, "key_scale_BHJ4");
  shapes.bind(shift, "shift_BNS");
  shapes.bind(threshold, "threshold_BNQ");
  expect(op, query, "query_BNQD", ScalarType::Char, "int8");
  expect(op, key, "key_BHSD", ScalarType::Char, "int8");
  expect(op, query_scale, "query_scale_BNQ", ScalarType::Float, "float32");
  expect(op, key_scale, "key_scale_BHJ4", ScalarType::Float, "float32");
  expect(op, shift, "shift_BNS", ScalarType::Float, "float32");
  expect(op, threshold, "threshold_BNQ", ScalarType::Float, "float32");
  shapes.at_most("D", kMostCoded);
  BlockMap map = map_of(op, shapes, nullptr);
  if (shapes['J'] != map.columns() || shapes['4'] != BlockMap::kGroups)
    refuse(op, "key_scale_BHJ4 must hold ", map.columns(), " × ", BlockMap::kGroups, " scales per head");
  if (local < 0) refuse(op, "local is ", local, "; it must not be negative");
  check_codes(op, query, "query_BNQD");
  check_codes(op, key, "key_BHSD");
  Tensor bytes = torch::stable::new_empty(query, {shapes['B'], shapes['N'], map.offset(map.rows())}, ScalarType::Byte);
  map.bytes = static_cast<uint8_t*>(bytes.data_ptr());
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.data_ptr()); };
  EstimateBlocks a{static_cast<const int8_t*>(query.data_ptr()),
                   static_cast<const int8_t*>(key.data_ptr()),
                   floats(query_scale),
                   floats(key_scale),
                   floats(shift),
                   floats(threshold),
                   shapes['B'],
                   shapes['H'],
                   shapes['N'] / shapes['H'],
                   shapes['D'],
                   local,
                   map};
  kernels().estimate_blocks(a, threads());
  return bytes;
}

}  // namespace
}  // namespace kvpress
