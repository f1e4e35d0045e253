// What PyTorch calls as kvpress::attend_parts: checks, allocation, the kernel.
#pragma once

#include "../decode_rows/bind.h"

namespace kvpress {
namespace {

std::tuple<Tensor, Tensor, Tensor> attend_parts(const Tensor& query, const Tensor& key, const Tensor& value,
                                                const Tensor& table, const Tensor& counts, double scaling,
                                                double softcap, bool need_weights, const std::vector<Tensor>& old,
                                                const std::vector<int64_t>& layouts) {
  const char* op = "attend_parts";
  RowOperands rows(op, query, {key, value, table, counts}, scaling, softcap, old, layouts);
  DecodeRows& a = rows.a;
  int64_t chunks = pieces(a.pages.table_width * a.pages.page_slots, kChunk);
  for (int p = 0; p < a.parts; p++) chunks += pieces(a.part[p].table_width * a.part[p].layout.slots, kChunk);
  const int64_t batch = rows.shapes['B'], heads = rows.shapes['N'];
  Tensor out = empty(op, {chunks, batch, heads, a.queries, a.pages.value_width}, ScalarType::Float);
  Tensor lse = empty(op, {chunks, batch, heads, a.queries}, ScalarType::Float);
  Tensor weights = rows.weights(op, need_weights);
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  kernels().attend_parts(a, threads());
  return {out, lse, weights};
}

}  // namespace
}  // namespace kvpress
