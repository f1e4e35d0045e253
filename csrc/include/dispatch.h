// The kernels for the processor that this runs on, and the threads that they may use.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>

#include "args.h"
#include "bind.h"

#if defined(KVPRESS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvpress {

namespace avx512 {
extern const Kernels kernels, kernels_vnni, kernels_amx;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

namespace {

// Instruction sets, the fastest first.
constexpr const char* kSets[] = {"amx", "avx512vnni", "avx512", "avx2", "portable"};

// The place in kSets of the one that KVPRESS_CPU names: none before it may be used.
int first_set() {
  const char* wanted = std::getenv("KVPRESS_CPU");
  if (!wanted || !*wanted) return 0;
  for (int i = 0; i < 5; i++)
    if (!std::strcmp(wanted, kSets[i])) return i;
  refuse("operators", "KVPRESS_CPU='", wanted, "' is unknown; allowed: amx, avx512vnni, avx512, avx2, portable");
}

#if defined(KVPRESS_AMX)
// Whether there are tiles of bytes, and the system lets this process use them.
bool may_use_tiles() {
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBytes)) return false;
  return !syscall(SYS_arch_prctl, kAsk, kTileData);
}
#endif

struct Choice {
  const char* set;
  const Kernels* kernels;
};

// The fastest kernels that this machine runs, or those that KVPRESS_CPU names.
Choice choose() {
  [[maybe_unused]] const int first = first_set();
#if defined(KERNELS_FOR_AVX512)
  if (first <= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(KVPRESS_AMX)
    if (first == 0 && may_use_tiles()) return {"amx", &avx512::kernels_amx};
#endif
    if (first <= 1 && __builtin_cpu_supports("avx512vnni")) return {"avx512vnni", &avx512::kernels_vnni};
    return {"avx512", &avx512::kernels};
  }
#endif
#if defined(KERNELS_FOR_AVX2)
  if (first <= 3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return {"avx2", &avx2::kernels};
#endif
  return {"portable", &portable::kernels};
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

const Kernels& kernels() { return *choice().kernels; }

Threads threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t workers, const std::function<void(int64_t)>& work) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) work(i);
            });
          }};
}

// Threads for one call, which wait for a disk or for memory: PyTorch's are for computing. Where the system gives fewer,
// those that there are take their work.
Threads own_threads(int64_t count) {
  return {count, [](int64_t workers, const std::function<void(int64_t)>& work) {
            std::vector<std::thread> others;
            others.reserve(size_t(workers));
            try {
              while (int64_t(others.size()) < workers - 1) others.emplace_back(work, int64_t(others.size()) + 1);
            } catch (const std::system_error&) {}
            work(0);
            for (std::thread& other : others) other.join();
          }};
}

}  // namespace
}  // namespace kvpress
