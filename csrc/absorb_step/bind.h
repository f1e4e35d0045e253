// What PyTorch calls as kvpress::absorb_step: checks, allocation, the kernel.
#pragma once

#include "../include/bind_pages.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Checks the channels of keys that are merged, and those of them that are turned before.
void check_channels(const char* op, const AbsorbStep& a) {
  if (a.width < 1 || a.width > a.pages.key_width - a.merging.counts)
    refuse(op, "width is ", a.width, "; keys have ", a.pages.key_width, " channels, ", int(a.merging.counts),
           " of counts");
  const Turning& turn = a.turning;
  if (turn.start < 0 || plus(turn.start, times(2, turn.pairs)) > a.width)
    refuse(op, turn.pairs, " pairs of channels from ", turn.start, " on do not fit into ", a.width);
  if (turn.pairs && !a.merging.keys) refuse(op, "frequency_F is given, but keys are not merged");
}

// A fixed threshold does not move.
Merging merging_of(const char* op, Merging rule, bool fixed, const std::string& keys) {
  if (fixed) rule.memory = 1, rule.gain = 0;
  for (const double x : {rule.own, rule.memory, rule.gain})
    if (!(std::abs(x) <= kMost))
      refuse(op, "own, memory and gain are ", rule.own, ", ", rule.memory, ", ", rule.gain,
             "; -1e6 to 1e6 are allowed");
  rule.keys = one_of<int>(op, "keys", keys, {"values_only", "rotated", "unrotated"}) > 0;
  return rule;
}

Turning turning_of(const char* op, Shapes& shapes, const std::optional<Tensor>& frequency, bool interleaved,
                   int64_t start) {
  if (!frequency) return {nullptr, 0, start, interleaved};
  shapes.bind(*frequency, "frequency_F");
  expect(op, *frequency, "frequency_F", ScalarType::Float, "float32");
  return {static_cast<const float*>(frequency->data_ptr()), shapes['F'], start, interleaved};
}

void absorb_step(const Tensor& key_pool, const Tensor& value_pool, const Tensor& table, const Tensor& counts,
                 const Tensor& position_pool, const std::optional<Tensor>& mass_pool, const Tensor& seen,
                 const Tensor& quota, const Tensor& recent, const Tensor& sink, const std::string& rank,
                 const Tensor& threshold, const std::optional<Tensor>& frequency, bool interleaved, int64_t start,
                 int64_t width, double own, double memory, double gain, bool largest, bool normalised, bool together,
                 std::optional<double> fixed, const std::string& keys, bool sinks, bool counted) {
  const char* op = "absorb_step";
  const PageTensors pages{key_pool, value_pool, table, counts};
  const ColumnTensors columns{position_pool, mass_pool};
  const BoundTensors bounds{seen, quota, recent, sink};
  Shapes shapes(op);
  AbsorbStep a{};
  a.bounds = bounds_of(op, shapes, bounds, rank_of(op, rank, !mass_pool), 0);
  shapes.bind(threshold, "threshold_B");
  expect(op, threshold, "threshold_B", ScalarType::Float, "float32");
  const int64_t batch = shapes['B'], rows = shapes['R'];
  if (batch == 0 || rows % batch) refuse(op, "quota_R has ", rows, " rows for ", batch, " sequences");
  const Merging rule{own, memory, gain, largest, normalised, together, true, sinks, counted};
  a.merging = merging_of(op, rule, fixed.has_value(), keys);
  a.pages = pages_of(op, shapes, pages, false);
  a.columns = columns_of(op, shapes, columns);
  a.turning = turning_of(op, shapes, frequency, interleaved, start);
  a.width = width;
  check_channels(op, a);
  Memory spans(op);
  add(spans, pages, columns, bounds);
  spans.writes(threshold, "threshold_B");
  if (frequency) spans.reads(*frequency, "frequency_F");
  spans.check();
  a.counts = static_cast<int64_t*>(counts.data_ptr());
  a.batch = batch;
  a.heads = rows / batch;
  a.threshold = static_cast<float*>(threshold.data_ptr());
  kernels().absorb_step(a, threads());
}

}  // namespace
}  // namespace kvpress
