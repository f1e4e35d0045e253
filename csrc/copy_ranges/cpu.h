// Ranges of a list of bytes to rows of a target.
#pragma once

#include <algorithm>
#include <cstring>

#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

inline void copy_ranges(const CopyRanges& a, const Threads& threads) {
  constexpr int64_t kTask = 1 << 20, kThread = 4 << 20;  // bytes; a thread takes as long to make as to copy 0.2 MiB
  const int64_t together = std::max<int64_t>(1, kTask / a.width);
  // No product of count and width overflows: each row of the target is written once.
  const Threads worthwhile{std::min(threads.count, a.count * a.width / kThread), threads.parallel};
  share(worthwhile, (a.count + together - 1) / together, true, [&](int64_t task) {
    for (int64_t i = task * together; i < std::min(a.count, (task + 1) * together); i++)
      std::memcpy(a.target + a.to[i] * a.width, a.source + a.begin[i], size_t(a.width));
  });
}

}  // namespace kvpress::KERNEL_ISA
