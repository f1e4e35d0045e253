// What PyTorch calls as kvpress::decode_chosen: the operators that it is made of, one after the other. README.md says why.
#pragma once

#include <limits>

#include "../choose_pages/bind.h"
#include "../decode_rows/bind.h"
#include "../missed_mass/bind.h"
#include "../score_cells/bind.h"
#include "../score_pages/bind.h"

namespace kvpress {
namespace {

// The same numbers, in another shape.
template <size_t N>
Tensor viewed(const Tensor& x, const int64_t (&sizes)[N]) {
  int64_t strides[N], step = 1;
  for (size_t i = N; i-- > 0; step *= sizes[i]) strides[i] = step;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), N, sizes, strides, 0, &made));
  return Tensor(made);
}

int64_t* longs(const Tensor& x) { return static_cast<int64_t*>(x.data_ptr()); }

// Of whatever numbers there are; too large ones wrap, as PyTorch's do.
int64_t minus(int64_t a, int64_t b) { return int64_t(uint64_t(a) - uint64_t(b)); }

// Old slots of all rows in one format, as they are found: see compose.py.
struct ChosenPart {
  Tensor table, pages, bound, place, chosen, judged, read, counts;  // the last two: of what is read
  int64_t slots;
};

class ChosenStep {
 public:
  ChosenStep(const char* op, const Tensor& query, const Tensor& table, const Tensor& counts,
             const std::vector<Tensor>& old, const std::vector<int64_t>& layouts, const std::vector<Tensor>& judged,
             const Tensor& seen, const std::vector<int64_t>& slots, int64_t sink, int64_t recent, int64_t bits,
             int64_t candidates)
      : op_(op), old_(old), layouts_(layouts), judged_(judged), slots_(slots), bits_(bits), candidates_(candidates),
        shapes_(op), recent_(counts) {
    shapes_.bind(query, "query_BN1D");
    shapes_.bind(table, "table_RW");
    shapes_.bind(counts, "counts_R");
    shapes_.bind(seen, "seen_B");
    expect(op, counts, "counts_R", ScalarType::Long, "int64");
    expect(op, seen, "seen_B", ScalarType::Long, "int64");
    shapes_.at_least_one("BNR");
    rows_ = shapes_['R'];
    parts_ = layouts.size() / kLayoutSizes;
    if (layouts.size() % kLayoutSizes || old.size() != parts_ * kPartTensors || parts_ > size_t(kMostParts))
      refuse(op, old.size(), " tensors and ", layouts.size(), " sizes of old slots");
    if (judged.size() != parts_ * kBeside)
      refuse(op, "judged has ", judged.size(), " tensors; ", parts_, " parts have ", kBeside, " each");
    if (int64_t(slots.size()) != rows_ || rows_ % shapes_['B'])
      refuse(op, "slots has ", slots.size(), " numbers, of ", rows_, " rows of ", shapes_['B']);
    if (candidates < 0 || candidates > kMostSlots)
      refuse(op, "candidates is ", candidates, "; 0 to ", kMostSlots, " are allowed");
    const Tensor whole = query.is_contiguous() ? query : torch::stable::contiguous(query);
    query_ = viewed(whole, {shapes_['B'], shapes_['N'], shapes_['D']});
    sink_ = row_numbers([&](int64_t) { return sink; });
    const int64_t heads = rows_ / shapes_['B'];
    from_ = row_numbers([&](int64_t r) { return minus(longs(seen)[r / heads], recent); });
  }

  size_t parts() const { return parts_; }
  int64_t rows() const { return rows_; }

  ChosenPart choose(size_t i) const {
    const Tensor *part = &old_[i * kPartTensors], *beside = &judged_[i * kBeside];
    const Tensor &table = part[3], &counts = part[4], &box = beside[0], &cell = beside[2], &span = beside[3];
    const int64_t slots = layout_of(op_, &layouts_[i * kLayoutSizes]).slots;
    check_defined(op_, table, "table");
    check_defined(op_, counts, "counts");
    expect(op_, counts, "counts", ScalarType::Long, "int64");
    if (table.dim() != 2 || counts.dim() != 1 || counts.size(0) != rows_)
      refuse(op_, "table ", shape_of(table), " and counts ", shape_of(counts), " of old slots for ", rows_, " rows");
    const int64_t places = table.size(1), all = std::numeric_limits<int64_t>::max();
    const Tensor pages = row_numbers([&](int64_t r) { return longs(counts)[r] / slots; });
    const auto may_read = [&](int64_t r) { return std::max<int64_t>(0, minus(slots_[r], longs(recent_)[r])) / slots; };
    const Tensor keep = row_numbers(may_read);
    ChosenPart made{table, pages, score_pages(query_, box, table, pages), {}, {}, {}, {}, {}, slots};
    Tensor rank = made.bound;
    if (bits_) {
      const Tensor most =
          row_numbers([&](int64_t r) { return candidates_ ? times(std::min(may_read(r), places), candidates_) : all; });
      const auto [place, named] = choose_pages(rank, table, pages, span, sink_, from_, most);
      made.judged = named;
      std::tie(rank, made.bound) = score_cells(query_, box, cell, table, pages, place, named, made.bound, bits_, slots);
    } else {
      made.judged = row_numbers([](int64_t) { return 0; });
    }
    std::tie(made.place, made.chosen) = choose_pages(rank, table, pages, span, sink_, from_, keep);
    made.read = pages_at(table, made.place, made.chosen);
    made.counts = row_numbers([&](int64_t r) { return longs(made.chosen)[r] * slots; });
    return made;
  }

  // The tensors of a part of which rows have the chosen pages alone.
  void add_tensors(const ChosenPart& part, size_t i, std::vector<Tensor>& to) const {
    for (size_t j = 0; j < kPartTensors; j++) to.push_back(old_[i * kPartTensors + j]);
    Tensor* of = &to[to.size() - kPartTensors];
    of[3] = part.read;
    of[4] = part.counts;
    of[7] = empty(op_, {0}, ScalarType::Long);  // holes are counted over all pages
  }

  std::tuple<Tensor, Tensor> missed(const ChosenPart& part, size_t i, double scaling, double softcap) const {
    return missed_mass(query_, part.bound, part.table, part.pages, part.place, part.chosen, judged_[i * kBeside + 1],
                       scaling, softcap, part.slots);
  }

 private:
  static constexpr size_t kBeside = 4;

  template <class F>
  Tensor row_numbers(F number) const {
    Tensor made = empty(op_, {rows_}, ScalarType::Long);
    for (int64_t r = 0; r < rows_; r++) longs(made)[r] = number(r);
    return made;
  }

  // A shorter table: the pages at some places of rows.
  Tensor pages_at(const Tensor& table, const Tensor& place, const Tensor& chosen) const {
    int64_t most = 0;
    for (int64_t r = 0; r < rows_; r++) most = std::max(most, longs(chosen)[r]);
    Tensor made = empty(op_, {rows_, most}, ScalarType::Int);
    const auto *from = static_cast<const int32_t*>(table.data_ptr()), *at = static_cast<int32_t*>(place.data_ptr());
    auto* to = static_cast<int32_t*>(made.data_ptr());
    for (int64_t r = 0; r < rows_; r++, from += table.size(1), at += table.size(1), to += most)
      for (int64_t w = 0; w < most; w++) to[w] = w < longs(chosen)[r] ? from[at[w]] : 0;
    return made;
  }

  const char* op_;
  const std::vector<Tensor>& old_;
  const std::vector<int64_t>& layouts_;
  const std::vector<Tensor>& judged_;
  const std::vector<int64_t>& slots_;
  int64_t bits_, candidates_, rows_;
  size_t parts_;
  Shapes shapes_;
  Tensor query_, recent_, sink_, from_;
};

// What is missed of several parts together: ln of the sum, and the longest value.
void join_missed(const std::tuple<Tensor, Tensor>& more, float* mass, int64_t heads, float* length, int64_t rows) {
  const auto* own = static_cast<const float*>(std::get<0>(more).data_ptr());
  const auto* longest = static_cast<const float*>(std::get<1>(more).data_ptr());
  for (int64_t n = 0; n < heads; n++) {
    const float most = std::max(mass[n], own[n]), least = std::min(mass[n], own[n]);
    mass[n] = least == -INFINITY ? most : most + std::log1p(std::exp(least - most));
  }
  for (int64_t r = 0; r < rows; r++) length[r] = std::max(length[r], longest[r]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_chosen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& table, const Tensor& counts,
    double scaling, double softcap, const std::vector<Tensor>& old, const std::vector<int64_t>& layouts,
    const std::vector<Tensor>& judged, const Tensor& seen, const std::vector<int64_t>& slots, int64_t sink,
    int64_t recent, int64_t bits, int64_t candidates) {
  const char* op = "decode_chosen";
  const ChosenStep step(op, query, table, counts, old, layouts, judged, seen, slots, sink, recent, bits, candidates);
  const int64_t batch = query.size(0), heads = query.size(1), rows = step.rows();
  std::vector<ChosenPart> parts;
  std::vector<Tensor> some;
  int64_t places = 0;
  for (size_t i = 0; i < step.parts(); i++) {
    parts.push_back(step.choose(i));
    step.add_tensors(parts[i], i, some);
    places += parts[i].table.size(1);
  }
  const auto [out, lse, weights] =
      decode_rows(query, key, value, table, counts, scaling, softcap, false, some, layouts);
  Tensor mass = empty(op, {batch, heads}, ScalarType::Float), length = empty(op, {rows}, ScalarType::Float);
  auto *masses = static_cast<float*>(mass.data_ptr()), *lengths = static_cast<float*>(length.data_ptr());
  std::fill_n(masses, batch * heads, -INFINITY);
  std::fill_n(lengths, rows, 0.0f);
  Tensor place = empty(op, {rows, places}, ScalarType::Int);
  Tensor chosen = empty(op, {int64_t(parts.size()), rows}, ScalarType::Long);
  Tensor named = empty(op, {int64_t(parts.size()), rows}, ScalarType::Long);
  int64_t before = 0;
  for (size_t i = 0; i < parts.size(); i++) {
    const ChosenPart& part = parts[i];
    join_missed(step.missed(part, i, scaling, softcap), masses, batch * heads, lengths, rows);
    const int64_t width = part.table.size(1);
    for (int64_t r = 0; r < rows; r++)
      std::copy_n(static_cast<const int32_t*>(part.place.data_ptr()) + r * width, width,
                  static_cast<int32_t*>(place.data_ptr()) + r * places + before);
    std::copy_n(longs(part.chosen), rows, longs(chosen) + int64_t(i) * rows);
    std::copy_n(longs(part.judged), rows, longs(named) + int64_t(i) * rows);
    before += width;
  }
  return {out, viewed(lse, {batch, heads}), mass, length, place, chosen, named};
}

}  // namespace
}  // namespace kvpress
