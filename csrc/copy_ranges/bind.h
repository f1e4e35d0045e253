// What PyTorch calls as kvpress::copy_ranges: checks, threads, the kernel.
#pragma once

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// No row may be written by two threads.
void check_rows(const char* op, const int64_t* to, int64_t count, int64_t rows) {
  bool ascend = true;  // as they do mostly: then none comes twice
  for (int64_t i = 0; i < count; i++) {
    if (to[i] < 0 || to[i] >= rows) refuse(op, "range ", i, " goes to row ", to[i], " of ", rows);
    ascend = ascend && (!i || to[i - 1] < to[i]);
  }
  if (ascend) return;
  std::vector<int64_t> sorted(to, to + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse(op, "two ranges go to row ", *twice);
}

void check_begins(const char* op, const int64_t* begin, int64_t count, int64_t width, int64_t size) {
  for (int64_t i = 0; i < count; i++)
    if (begin[i] < 0 || begin[i] > size - width)
      refuse(op, "range ", i, " of ", width, " bytes from ", begin[i], " on does not lie in source, which has ", size,
             " bytes");
}

void copy_ranges(Tensor target, Tensor to, Tensor source, Tensor begin, int64_t thread_count) {
  const char* op = "copy_ranges";
  constexpr int64_t kMostThreads = 64;
  Shapes shapes(op);
  shapes.bind(target, "target_PX");
  shapes.bind(to, "to_A");
  shapes.bind(begin, "begin_A");
  expect(op, target, "target_PX", ScalarType::Byte, "uint8");
  expect(op, source, "source", ScalarType::Byte, "uint8");
  expect(op, to, "to_A", ScalarType::Long, "int64");
  expect(op, begin, "begin_A", ScalarType::Long, "int64");
  if (!source.is_cpu()) refuse(op, "all tensors must be on the CPU");
  if (source.dim() != 1) refuse(op, "source has shape ", shape_of(source), "; it must be a list of bytes");
  if (thread_count < 1 || thread_count > kMostThreads)
    refuse(op, "threads is ", thread_count, "; 1 to ", kMostThreads, " are allowed");
  Memory memory(op);
  memory.writes(target, "target_PX");
  memory.reads(to, "to_A");
  memory.reads(source, "source");
  memory.reads(begin, "begin_A");
  memory.check();
  CopyRanges a{static_cast<uint8_t*>(target.data_ptr()),
               static_cast<const int64_t*>(to.data_ptr()),
               static_cast<const uint8_t*>(source.data_ptr()),
               static_cast<const int64_t*>(begin.data_ptr()),
               shapes['A'],
               shapes['X']};
  check_rows(op, a.to, a.count, shapes['P']);
  check_begins(op, a.begin, a.count, a.width, source.numel());
  if (a.count && a.width) kernels().copy_ranges(a, own_threads(thread_count));
}

}  // namespace
}  // namespace kvpress
