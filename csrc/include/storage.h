// Numbers of any storage type, read as floats and written from them.
#pragma once

#include "args.h"
#include "simd.h"

namespace kvpress::KERNEL_ISA {

// Calls f with a value of the storage type.
template <class F>
inline void with_storage(Type type, const F& f) {
  if (type == Type::kFloat32) f(float{});
  if (type == Type::kBFloat16) f(BFloat16{});
  if (type == Type::kFloat16) f(Float16{});
}

// The first numbers of a vector that may end before it does; the others are `rest`.
inline Vec load_some(const float* from, int64_t count, float rest) {
  if (count >= kWidth) return load(from);
  float line[kWidth];
  for (int i = 0; i < kWidth; i++) line[i] = i < count ? from[i] : rest;
  return load(line);
}

inline void read_floats(const void* from, Type type, int64_t offset, int64_t count, float factor, float* to) {
  with_storage(type, [&](auto storage) {
    const auto* typed = static_cast<const decltype(storage)*>(from) + offset;
    for (int64_t i = 0; i < count; i++) to[i] = to_float(typed[i]) * factor;
  });
}

inline void write_floats(const float* from, int64_t count, void* to, Type type, int64_t offset) {
  with_storage(type, [&](auto storage) {
    auto* typed = static_cast<decltype(storage)*>(to) + offset;
    for (int64_t i = 0; i < count; i++) from_float(from[i], typed + i);
  });
}

}  // namespace kvpress::KERNEL_ISA
