// What PyTorch calls as kvpress::read_records: checks, allocation, threads, the kernel.
#pragma once

#include <climits>

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

void check_read(const char* op, const Read& read, int64_t index, int64_t size) {
  if (std::min({read.offset, read.length, read.place, read.begin, read.checked}) < 0)
    refuse(op, "read ", index, " has a negative number: [", read.offset, ", ", read.length, ", ", read.place, ", ",
           read.begin, ", ", read.checked, "]");
  const int64_t end = plus(read.place, read.length), checked = plus(read.begin, read.checked);
  if (plus(read.offset, read.length) == INT64_MAX)
    refuse(op, "read ", index, " of ", read.length, " bytes from ", read.offset, " on ends beyond what files hold");
  if (end > size) refuse(op, "read ", index, " ends at ", end, " in the arena, which has ", size, " bytes");
  if (checked > read.length) refuse(op, "read ", index, " checks up to ", checked, " of ", read.length, " bytes");
}

// No byte of the arena may be written by two threads.
void check_places(const char* op, const Read* reads, int64_t count) {
  std::vector<std::pair<int64_t, int64_t>> places;
  for (int64_t i = 0; i < count; i++)
    if (reads[i].length) places.emplace_back(reads[i].place, reads[i].length);
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); i++)
    if (places[i].first < places[i - 1].first + places[i - 1].second)
      refuse(op, "two reads go to byte ", places[i].first, " of the arena");
}

Tensor read_records(int64_t fd, Tensor reads, Tensor arena, int64_t thread_count) {
  const char* op = "read_records";
  constexpr int64_t kNumbers = sizeof(Read) / sizeof(int64_t), kMostThreads = 64;
  expect(op, reads, "reads_AX", ScalarType::Long, "int64");
  expect(op, arena, "arena", ScalarType::Byte, "uint8");
  if (!reads.is_cpu() || !arena.is_cpu()) refuse(op, "reads_AX and arena must be on the CPU");
  if (reads.dim() != 2 || reads.size(1) != kNumbers)
    refuse(op, "reads_AX has shape ", shape_of(reads), "; it must be [A, ", kNumbers, "]");
  if (arena.dim() != 1) refuse(op, "arena has shape ", shape_of(arena), "; it must be a list of bytes");
  if (fd < 0 || fd > INT_MAX) refuse(op, "fd is ", fd, "; 0 to ", INT_MAX, " are allowed");
  if (thread_count < 1 || thread_count > kMostThreads)
    refuse(op, "threads is ", thread_count, "; 1 to ", kMostThreads, " are allowed");
  Memory memory(op);
  memory.writes(arena, "arena");
  memory.reads(reads, "reads_AX");
  memory.check();
  const auto* read = static_cast<const Read*>(reads.data_ptr());
  const int64_t count = reads.size(0);
  for (int64_t i = 0; i < count; i++) check_read(op, read[i], i, arena.numel());
  check_places(op, read, count);
  Tensor status = empty(op, {count}, ScalarType::Long);
  ReadRecords a{int(fd), read, count, static_cast<uint8_t*>(arena.data_ptr()),
                static_cast<int64_t*>(status.data_ptr())};
  kernels().read_records(a, own_threads(thread_count));
  return status;
}

}  // namespace
}  // namespace kvpress
