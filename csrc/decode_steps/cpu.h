// Decode steps of one layer in several caches: each as decode_step does it. See README.md.
#pragma once

#include "../decode_step/cpu.h"

namespace kvpress::KERNEL_ISA {

// A cache is a task where there are enough of them; otherwise all threads work on one after the other.
inline void decode_steps(const DecodeStep* steps, int64_t count, const Threads& threads) {
  if (count < 2 * threads.count) {
    for (int64_t t = 0; t < count; t++) decode_step(steps[t], threads);
    return;
  }
  const Threads one{1, {}};
  share(threads, count, true, [&](int64_t t) { decode_step(steps[t], one); });
}

}  // namespace kvpress::KERNEL_ISA
