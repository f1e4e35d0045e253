// Work sharing and scratch memory.
#pragma once

#include <atomic>
#include <memory>

#include "args.h"

namespace kvpress::KERNEL_ISA {

// Calls task(i) for every i < tasks; whoever is free takes the next one. Results must not depend on who does what.
template <class Task>
void share(const Threads& threads, int64_t tasks, bool worthwhile, const Task& task) {
  if (!worthwhile || threads.count < 2 || tasks < 2) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.parallel(threads.count < tasks ? threads.count : tasks, [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  });
}

// Uninitialised memory that a thread keeps between calls, so that no call waits for fresh pages.
template <class T, class Tag>
T* scratch(int64_t count) {
  struct Buffer {
    std::unique_ptr<char[]> memory;
    int64_t bytes = 0;
  };
  static thread_local Buffer buffer;
  const int64_t bytes = count * int64_t(sizeof(T)) + 64;
  if (bytes > buffer.bytes) {
    buffer.memory.reset();
    buffer.memory.reset(new char[bytes]);
    buffer.bytes = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.memory.get());
  return reinterpret_cast<T*>((address + 63) & ~uintptr_t{63});
}

}  // namespace kvpress::KERNEL_ISA
