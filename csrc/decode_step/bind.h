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

// The tensors of a step, but for old slots.
struct StepTensors {
  const Tensor &query, &key, &value;
  PageTensors pages;
  ColumnTensors columns;
  BoundTensors bounds;
};

// A step whose operands were checked, but for old slots and for memory that two of them share. It owns the copies of
// tensors that lie in no order that kernels read.
struct StepOperands {
  Shapes shapes;
  Strided query, key, value;
  DecodeStep step{};

  StepOperands(const char* op, const StepTensors& x, const std::string& rank, bool evict, const Noise& noise,
               const Logits& logits)
      : shapes(bound(op, x)), query(op, x.query, "query_BN1D"), key(op, x.key, "key_BH1D"),
        value(op, x.value, "value_BH1E") {
    step.attend = rows_of(op, shapes, query, x.pages, logits, true);
    if (step.attend.heads != shapes['H'])
      refuse(op, "key_BH1D has ", shapes['H'], " heads, table_RW has ", step.attend.heads);
    step.attend.queries = 1;
    step.key = key.heads;
    step.value = value.heads;
    step.columns = columns_of(op, shapes, x.columns);
    step.counts = static_cast<int64_t*>(x.pages.counts.data_ptr());
    step.bounds = bounds_of(op, shapes, x.bounds, rank_of(op, rank, evict && !x.columns.mass), 1);
    step.evict = evict;
    step.noise = noise;
  }

 private:
  static Shapes bound(const char* op, const StepTensors& x) {
    Shapes shapes(op);
    shapes.bind(x.query, "query_BN1D");
    shapes.bind(x.key, "key_BH1D");
    shapes.bind(x.value, "value_BH1E");
    return shapes;
  }
};

// What a step reads and writes, but for old slots.
void add(Memory& memory, const StepTensors& x) {
  add(memory, x.pages, x.columns, x.bounds);
  memory.reads(x.query, "query_BN1D");
  memory.reads(x.key, "key_BH1D");
  memory.reads(x.value, "value_BH1E");
}

Tensor decode_step(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_pool,
                   const Tensor& value_pool, const Tensor& table, const Tensor& counts, const Tensor& position_pool,
                   const std::optional<Tensor>& mass_pool, const Tensor& seen, const Tensor& quota,
                   const Tensor& recent, const Tensor& sink, const std::string& rank, bool evict,
                   const std::string& noise, double tau, int64_t seed, int64_t layer, int64_t first, double scaling,
                   double softcap, const std::vector<Tensor>& old, const std::vector<int64_t>& layouts) {
  const char* op = "decode_step";
  const StepTensors tensors{query,
                            key,
                            value,
                            {key_pool, value_pool, table, counts},
                            {position_pool, mass_pool},
                            {seen, quota, recent, sink}};
  const Logits logits = logits_of(op, scaling, softcap);
  StepOperands given(op, tensors, rank, evict, noise_of(op, noise, tau, seed, layer, first), logits);
  DecodeStep& a = given.step;
  add_parts(op, a.attend, old, layouts);
  check_old(op, a);
  Memory memory(op);
  add(memory, tensors);
  for (size_t i = 0; i < old.size(); i++) {
    const bool written = i % kPartTensors >= 5;
    written ? memory.writes(old[i], "old slots") : memory.reads(old[i], "old slots");
  }
  memory.check();
  Tensor out = empty(op, {given.shapes['B'], given.shapes['N'], 1, given.shapes['E']}, query.scalar_type());
  a.attend.out = out.data_ptr();
  kernels().decode_step(a, threads());
  return out;
}

}  // namespace
}  // namespace kvpress
