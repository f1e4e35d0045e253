// A warp that multiplies 16 × 64 by 64 × 8 codes, one lane after the other, as the PTX manual spreads them over lanes:
// element k of a row of queries is in lane 4·(row mod 8) + k/8 mod 4, word row/8 + 2·(k/32).

#include "fragments.h"
using namespace kvpress::fragments;
extern "C" void multiply(const uint32_t* query, const uint32_t* key, int64_t of_row, int bytes, int32_t* out) {
  uint32_t a[32][4], b[32][2];
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) a[lane][i] = word_of(query, query_row(lane, i), of_row, query_channel(lane, i));
    for (int i = 0; i < 2; i++) b[lane][i] = word_of(key, key_of(lane), of_row, key_channel(lane, i));
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      int32_t sum = 0;
      for (int k = 0; k < 64; k++) {
        const uint32_t q = a[row % 8 * 4 + k / 8 % 4][row / 8 + k / 32 * 2], x = b[column * 4 + k / 8 % 4][k / 32];
        if (!bytes) sum += code_of(q, k % 8) * code_of(x, k % 8);
        if (bytes) {
          const int at = k % 8 / 2 * 8;
          sum += int8_t(bytes_of(q, k % 2) >> at) * int8_t(bytes_of(x, k % 2) >> at);
        }
      }
      out[sum_row(lane, i) * 8 + sum_key(lane, i)] = sum;
    }
}
