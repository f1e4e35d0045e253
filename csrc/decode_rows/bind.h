// What PyTorch calls as kvpress::decode_rows: checks, allocation, the kernel.
#pragma once

#include "../include/bind_old.h"
#include "../include/bind_pages.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor, Tensor> decode_rows(const Tensor& query, const Tensor& key, const Tensor& value,
                                               const Tensor& table, const Tensor& counts, double scaling,
                                               double softcap, bool need_weights, const std::vector<Tensor>& old,
                                               const std::vector<int64_t>& layouts) {
  const char* op = "decode_rows";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  if (shapes['Q'] < 1 || shapes['Q'] > kMostQueries)
    refuse(op, "query_BNQD has ", shapes['Q'], " queries; 1 to ", kMostQueries, " are allowed");
  const Strided queries(op, query, "query_BNQD");
  DecodeRows a = rows_of(op, shapes, queries, {key, value, table, counts}, logits_of(op, scaling, softcap), false);
  a.queries = shapes['Q'];
  const int64_t slots = add_parts(op, a, old, layouts);
  Tensor out = empty(op, {shapes['B'], shapes['N'], a.queries, a.pages.value_width}, query.scalar_type());
  Tensor lse = empty(op, {shapes['B'], shapes['N'], a.queries}, ScalarType::Float);
  Tensor weights = need_weights ? empty(op, {shapes['B'], shapes['N'], a.queries, slots}, ScalarType::Float)
                                : empty(op, {0}, ScalarType::Float);
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  a.weights = need_weights ? static_cast<float*>(weights.data_ptr()) : nullptr;
  kernels().decode_rows(a, threads());
  return {out, lse, weights};
}

}  // namespace
}  // namespace kvpress
