// How the operands and results of mma.m16n8k64 (4-bit signed codes, 32-bit sums) are spread over the lanes of a warp, and
// how codes are packed for it. Plain functions that the host can call too: its tests prove them without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVPRESS_ANYWHERE __host__ __device__ __forceinline__
#else
#define KVPRESS_ANYWHERE inline
#endif

namespace kvpress::fragments {

constexpr int kRows = 16, kKeys = 8, kChannels = 64;  // of one product
constexpr int kChannelsPerWord = 8;                   // 4 bits each, the first in the lowest ones

// Lane = 4 · group + place. Word i of the queries: 8 channels of row query_row from query_channel on.
KVPRESS_ANYWHERE int query_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
KVPRESS_ANYWHERE int query_channel(int lane, int i) { return lane % 4 * kChannelsPerWord + i / 2 * 32; }
// Word i of the keys: 8 channels of key `key_of` from key_channel on.
KVPRESS_ANYWHERE int key_of(int lane) { return lane / 4; }
KVPRESS_ANYWHERE int key_channel(int lane, int i) { return lane % 4 * kChannelsPerWord + i * 32; }
// Sum i is that of row sum_row and key sum_key.
KVPRESS_ANYWHERE int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
KVPRESS_ANYWHERE int sum_key(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Packed codes of one row: `words` words of 8 channels. Beyond the width codes are 0.
KVPRESS_ANYWHERE int64_t words(int64_t width) {
  return (width + kChannels - 1) / kChannels * (kChannels / kChannelsPerWord);
}

KVPRESS_ANYWHERE uint32_t word_of(const uint32_t* packed, int64_t row, int64_t words_of_row, int channel) {
  return packed[row * words_of_row + channel / kChannelsPerWord];
}

// Code c of a word, sign-extended.
KVPRESS_ANYWHERE int code_of(uint32_t word, int c) { return int(int32_t(word << (28 - 4 * c)) >> 28); }

// The codes at even (`high` false) or odd places of a word, as bytes of 16 · code: where there are no 4-bit products, those
// of bytes come to 256 times as much, exactly.
KVPRESS_ANYWHERE uint32_t bytes_of(uint32_t word, bool high) {
  return high ? word & 0xF0F0F0F0u : word << 4 & 0xF0F0F0F0u;
}

}  // namespace kvpress::fragments
