// What PyTorch calls as kvpress::score_pages: checks, allocation, the kernel.
#pragma once

#include "../include/bind_retrieval.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Binds B, N, D, P, R and W; there is no `bound` yet.
ScorePages scored_pages(const char* op, Shapes& shapes, const Tensor& query, const Tensor& box, const Tensor& table,
                        const Tensor& pages) {
  shapes.bind(query, "query_BND");
  bind_two(op, shapes, box, "box_PXD", "box_P2D");
  expect(op, query, "query_BND", query.scalar_type(), "");
  expect(op, box, "box_P2D", box.scalar_type(), "");
  shapes.at_least_one("D");
  shapes.at_most("D", kMostCoded);
  return {row_pages_of(op, shapes, table, pages),
          query.data_ptr(),
          box.data_ptr(),
          type_of(op, query, "query_BND"),
          type_of(op, box, "box_P2D"),
          shapes['D'],
          nullptr};
}

Tensor score_pages(const Tensor& query, const Tensor& box, const Tensor& table, const Tensor& pages) {
  const char* op = "score_pages";
  Shapes shapes(op);
  ScorePages a = scored_pages(op, shapes, query, box, table, pages);
  Tensor bound = empty(op, {shapes['B'], shapes['N'], shapes['W']}, ScalarType::Float);
  a.bound = static_cast<float*>(bound.data_ptr());
  kernels().score_pages(a, threads());
  return bound;
}

}  // namespace
}  // namespace kvpress
