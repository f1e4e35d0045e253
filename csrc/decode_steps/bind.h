// What PyTorch calls as kvpress::decode_steps: checks, allocation, the kernel.
#pragma once

#include "../decode_step/bind.h"

namespace kvpress {
namespace {

// Refuses a list of another length than `queries`.
template <class Entry>
void check_length(const char* op, const char* name, const std::vector<Entry>& entries, size_t count) {
  if (entries.size() != count) refuse(op, name, " has ", entries.size(), " entries, queries has ", count);
}

Tensor decode_steps(const std::vector<Tensor>& queries, const std::vector<Tensor>& keys,
                    const std::vector<Tensor>& values, const std::vector<Tensor>& key_pools,
                    const std::vector<Tensor>& value_pools, const std::vector<Tensor>& tables,
                    const std::vector<Tensor>& counts, const std::vector<Tensor>& positions,
                    const std::vector<Tensor>& masses, const std::vector<Tensor>& seen,
                    const std::vector<Tensor>& quotas, const std::vector<Tensor>& recents,
                    const std::vector<Tensor>& sinks, const std::string& rank, const std::vector<int64_t>& evict,
                    const std::string& noise, const std::vector<double>& tau, const std::vector<int64_t>& seed,
                    int64_t layer, int64_t first, double scaling, double softcap) {
  const char* op = "decode_steps";
  const size_t count = queries.size();
  if (count == 0) refuse(op, "queries is empty");
  const std::pair<const char*, const std::vector<Tensor>*> lists[] = {
      {"keys", &keys},     {"values", &values},   {"key_pools", &key_pools}, {"value_pools", &value_pools},
      {"tables", &tables}, {"counts", &counts},   {"positions", &positions}, {"seen", &seen},
      {"quotas", &quotas}, {"recents", &recents}, {"sinks", &sinks}};
  for (const auto& [name, list] : lists) check_length(op, name, *list, count);
  if (!masses.empty()) check_length(op, "masses", masses, count);
  check_length(op, "evict", evict, count);
  check_length(op, "tau", tau, count);
  check_length(op, "seed", seed, count);

  std::vector<std::optional<Tensor>> mass(count);
  for (size_t t = 0; t < masses.size(); t++) mass[t] = masses[t];
  std::vector<StepOperands> given;
  given.reserve(count);
  Memory memory(op);
  for (size_t t = 0; t < count; t++) {
    const StepTensors tensors{queries[t],
                              keys[t],
                              values[t],
                              {key_pools[t], value_pools[t], tables[t], counts[t]},
                              {positions[t], mass[t]},
                              {seen[t], quotas[t], recents[t], sinks[t]}};
    given.emplace_back(op, tensors, rank, evict[t] != 0, noise_of(op, noise, tau[t], seed[t], layer, first),
                       logits_of(op, scaling, softcap));
    const Shapes &own = given.back().shapes, &others = given.front().shapes;
    if (own['B'] != 1) refuse(op, "cache ", t, " has ", own['B'], " sequences, not 1");
    if (own['N'] != others['N'] || own['E'] != others['E'] || queries[t].scalar_type() != queries[0].scalar_type())
      refuse(op, "cache ", t, " has other heads, widths or dtypes");
    add(memory, tensors);
  }
  memory.check();
  const int64_t heads = given[0].shapes['N'], width = given[0].shapes['E'];
  Tensor out = empty(op, {int64_t(count), heads, 1, width}, queries[0].scalar_type());
  std::vector<DecodeStep> steps(count);
  for (size_t t = 0; t < count; t++) {
    steps[t] = given[t].step;
    steps[t].attend.out = static_cast<char*>(out.data_ptr()) + int64_t(t) * heads * width * out.element_size();
  }
  kernels().decode_steps(steps.data(), int64_t(count), threads());
  return out;
}

}  // namespace
}  // namespace kvpress
