// Sizes that callers give may be any. Their sums and products stop at the largest number instead of going round, so that
// no check which compares them is passed by an overflow. For numbers that are not negative.
#pragma once

#include <cstdint>

namespace kvpress {

inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// How many pieces of a size hold a number.
inline int64_t pieces(int64_t number, int64_t size) { return number / size + (number % size != 0); }

}  // namespace kvpress
