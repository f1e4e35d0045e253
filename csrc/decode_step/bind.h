// What PyTorch calls as kvpress::decode_step: checks, allocation, the kernel.
#pragma once

#include "../include/bind_old.h"
#include "../include/bind_pages.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Refuses old slots that lack what a step changes.
void check_old(const char* op, const DecodeStep& a) {
  for (int p = 0; p < a.attend.parts; p++) {
    const Part& part = a.attend.part[p];
    if (part.pages == 0) continue;
    if ((a.columns.mass && (!part.mass || !part.position)) || (a.evict && (!part.position || !part.dropped)))
      refuse(op, "old slots need positions and dropped counts where something is evicted, and mass where it is kept");
  }
}

Tensor decode_step(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_pool,
                   const Tensor& value_pool, const Tensor& table, const Tensor& counts, const Tensor& position_pool,
                   const std::optional<Tensor>& mass_pool, const Tensor& seen, const Tensor& quota,
                   const Tensor& recent, const Tensor& sink, const std::string& rank, bool evict,
                   const std::string& noise, double tau, int64_t seed, int64_t layer, int64_t first, double scaling,
                   double softcap, const std::vector<Tensor>& old, const std::vector<int64_t>& layouts) {
  const char* op = "decode_step";
  const PageTensors pages{key_pool, value_pool, table, counts};
  const ColumnTensors columns{position_pool, mass_pool};
  const BoundTensors bounds{seen, quota, recent, sink};
  Shapes shapes(op);
  shapes.bind(query, "query_BN1D");
  shapes.bind(key, "key_BH1D");
  shapes.bind(value, "value_BH1E");
  const Strided queries(op, query, "query_BN1D"), keys(op, key, "key_BH1D"), values(op, value, "value_BH1E");
  DecodeStep a{};
  a.attend = rows_of(op, shapes, queries, pages, logits_of(op, scaling, softcap), true);
  if (a.attend.heads != shapes['H']) refuse(op, "key_BH1D has ", shapes['H'], " heads, table_RW has ", a.attend.heads);
  a.attend.queries = 1;
  a.key = keys.heads;
  a.value = values.heads;
  a.columns = columns_of(op, shapes, columns);
  a.counts = static_cast<int64_t*>(counts.data_ptr());
  a.bounds = bounds_of(op, shapes, bounds, rank_of(op, rank, evict && !mass_pool), 1);
  a.evict = evict;
  a.noise = noise_of(op, noise, tau, seed, layer, first);
  add_parts(op, a.attend, old, layouts);
  check_old(op, a);
  Memory memory(op);
  add(memory, pages, columns, bounds);
  memory.reads(query, "query_BN1D");
  memory.reads(key, "key_BH1D");
  memory.reads(value, "value_BH1E");
  for (size_t i = 0; i < old.size(); i++) {
    const bool written = i % kPartTensors >= 5;
    written ? memory.writes(old[i], "old slots") : memory.reads(old[i], "old slots");
  }
  memory.check();
  Tensor out = empty(op, {shapes['B'], shapes['N'], 1, shapes['E']}, query.scalar_type());
  a.attend.out = out.data_ptr();
  kernels().decode_step(a, threads());
  return out;
}

}  // namespace
}  // namespace kvpress
