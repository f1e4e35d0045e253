// What PyTorch calls as kvpress::decode_rows: checks, allocation, the kernel.
#pragma once

#include "../include/bind_old.h"
#include "../include/bind_pages.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// What decode_rows and attend_parts take, checked.
struct RowOperands {
  Shapes shapes;
  Strided queries;  // owns what the kernel reads
  DecodeRows a;
  int64_t slots;  // for which a row has room

  RowOperands(const char* op, const Tensor& query, const PageTensors& pages, double scaling, double softcap,
              const std::vector<Tensor>& old, const std::vector<int64_t>& layouts)
      : shapes(op), queries((shapes.bind(query, "query_BNQD"), Strided(op, query, "query_BNQD"))) {
    if (shapes['Q'] < 1 || shapes['Q'] > kMostQueries)
      refuse(op, "query_BNQD has ", shapes['Q'], " queries; 1 to ", kMostQueries, " are allowed");
    a = rows_of(op, shapes, queries, pages, logits_of(op, scaling, softcap), false);
    a.queries = shapes['Q'];
    slots = add_parts(op, a, old, layouts);
  }

  // Memory for the weights that are returned, if any.
  Tensor weights(const char* op, bool needed) {
    Tensor made = needed ? empty(op, {shapes['B'], shapes['N'], a.queries, slots}, ScalarType::Float)
                         : empty(op, {0}, ScalarType::Float);
    a.weights = needed ? static_cast<float*>(made.data_ptr()) : nullptr;
    return made;
  }
};

std::tuple<Tensor, Tensor, Tensor> decode_rows(const Tensor& query, const Tensor& key, const Tensor& value,
                                               const Tensor& table, const Tensor& counts, double scaling,
                                               double softcap, bool need_weights, const std::vector<Tensor>& old,
                                               const std::vector<int64_t>& layouts) {
  const char* op = "decode_rows";
  RowOperands rows(op, query, {key, value, table, counts}, scaling, softcap, old, layouts);
  DecodeRows& a = rows.a;
  const int64_t batch = rows.shapes['B'], heads = rows.shapes['N'];
  Tensor out = empty(op, {batch, heads, a.queries, a.pages.value_width}, query.scalar_type());
  Tensor lse = empty(op, {batch, heads, a.queries}, ScalarType::Float);
  Tensor weights = rows.weights(op, need_weights);
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  kernels().decode_rows(a, threads());
  return {out, lse, weights};
}

}  // namespace
}  // namespace kvpress
