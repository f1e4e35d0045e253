// `estimate_blocks` with 4-bit tensor cores (sm_80 to sm_89): one thread block per block of 64 queries of a head.
//
// Each of four warps holds the codes of 16 queries in registers and goes through the examined blocks of 32 keys. A thread's
// sums are of 2 rows and of keys 2t, 2t + 1 of every 8, which share a scale: bounds and shifts need no exchange. From sm_90
// on 4-bit products are emulated in software, far slower than bytes, which are used there instead.
#include <cuda_runtime.h>

#include <cstdint>

#include "fragments.h"

namespace {

using namespace kvpress::fragments;

constexpr int kQueries = 64, kSlots = 32, kWarps = kQueries / kRows, kTiles = kSlots / kKeys, kGroups = 4;
constexpr float kLow = -32768.0f, kHigh = 32767.0f;

struct Operands {
  const uint32_t *query, *key;  // packed codes [B, N, P, words], [B, H, S, words]
  const float *query_scale, *key_scale, *shift, *threshold;
  const int32_t *offset, *end, *first_local;  // of every row of the map
  uint8_t* map;                               // [B, N, bytes]
  int64_t queries, slots, columns, bytes;
  int group;
  float cap;
};

// sums += the products of 64 channels.
__device__ __forceinline__ void multiply(int32_t (&sums)[4], const uint32_t (&q)[4], const uint32_t (&k)[2]) {
#if __CUDA_ARCH__ >= 900
  for (int high = 0; high < 2; high++) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(bytes_of(q[0], high)), "r"(bytes_of(q[1], high)), "r"(bytes_of(q[2], high)), "r"(bytes_of(q[3], high)),
          "r"(bytes_of(k[0], high)), "r"(bytes_of(k[1], high)));
  }
#else
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "r"(k[0]), "r"(k[1]));
#endif
}

#if __CUDA_ARCH__ >= 900
constexpr int kFactor = 256;  // of the sums
#else
constexpr int kFactor = 1;
#endif

// In the order of the reference, without fused operations: maps are equal to the bit.
__device__ __forceinline__ bool is_above(int32_t dot, float shift, float inverse, float bound) {
  float moved = __fmul_rn(shift, inverse);
  moved = moved < kHigh ? fmaxf(moved, kLow) : kHigh;
  const float estimate = fminf(fmaxf(float(dot) + rintf(moved), kLow), kHigh);
  return estimate > bound || !(bound >= kLow);
}

template <int Steps>
__global__ void __launch_bounds__(32 * kWarps) estimate(const Operands a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int64_t head = blockIdx.y, kv_head = head / a.group;
  constexpr int64_t kWords = Steps * (kChannels / kChannelsPerWord);
  uint32_t query[Steps][4];
  float inverse[2], bound[2], cap[2];
  for (int half = 0; half < 2; half++) {
    const int64_t m = int64_t(row) * kQueries + warp * kRows + sum_row(lane, 2 * half);
    const bool real = m < a.queries;
    const float threshold = real ? a.threshold[head * a.queries + m] : INFINITY;
    inverse[half] = real ? __fdiv_rn(1.0f, a.query_scale[head * a.queries + m]) : 1.0f;
    bound[half] = __fmul_rn(threshold, inverse[half]);
    cap[half] = threshold == INFINITY ? kHigh : a.cap;
  }
#pragma unroll
  for (int step = 0; step < Steps; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t m = int64_t(row) * kQueries + warp * kRows + query_row(lane, i);
      query[step][i] = m < a.queries
                           ? word_of(a.query, head * a.queries + m, kWords, step * kChannels + query_channel(lane, i))
                           : 0u;
    }
  __shared__ int hit;
  const int end = a.end[row], local = a.first_local[row];
  uint8_t* bytes = a.map + head * a.bytes + a.offset[row];
  int bits = 0;
  for (int j = 0; j < end; j++) {
    bool computed = j == 0 || j >= local;
    if (!computed) {
      if (threadIdx.x == 0) hit = 0;
      __syncthreads();
      const float step_of_key = __fdiv_rn(1.0f, a.key_scale[(kv_head * a.columns + j) * kGroups + lane % 4]);
      float least[2];
      for (int half = 0; half < 2; half++) {
        const float exact = floorf(__fmul_rn(bound[half], step_of_key));
        least[half] = exact > cap[half] ? cap[half] : exact;
      }
      bool above = false;
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        const int64_t first = int64_t(j) * kSlots + tile * kKeys;
        int32_t sums[4] = {};
#pragma unroll
        for (int step = 0; step < Steps; step++) {
          uint32_t key[2];
          for (int i = 0; i < 2; i++)
            key[i] = word_of(a.key, kv_head * a.slots + first + key_of(lane), kWords,
                             step * kChannels + key_channel(lane, i));
          multiply(sums, query[step], key);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float shift = a.shift[head * a.slots + first + sum_key(lane, i)];
          above |= is_above(sums[i] / kFactor, shift, inverse[i / 2], least[i / 2]);
        }
      }
      if (__any_sync(0xFFFFFFFFu, above) && lane == 0) hit = 1;
      __syncthreads();
      computed = hit;
      __syncthreads();
    }
    bits |= int(computed) << j % 8;
    if (j % 8 == 7 || j + 1 == end) {
      if (threadIdx.x == 0) bytes[j / 8] = uint8_t(bits);
      bits = 0;
    }
  }
}

}  // namespace

// 0, or the CUDA error of the launch. heads: of queries, over the batch.
extern "C" int kvpress_estimate_blocks(const void* query, const void* key, const float* query_scale,
                                       const float* key_scale, const float* shift, const float* threshold,
                                       const int32_t* offset, const int32_t* end, const int32_t* first_local,
                                       uint8_t* map, int64_t queries, int64_t slots, int64_t columns, int64_t bytes,
                                       int64_t rows, int64_t heads, int64_t group, int64_t width, float cap,
                                       void* stream) {
  const Operands a{static_cast<const uint32_t*>(query),
                   static_cast<const uint32_t*>(key),
                   query_scale,
                   key_scale,
                   shift,
                   threshold,
                   offset,
                   end,
                   first_local,
                   map,
                   queries,
                   slots,
                   columns,
                   bytes,
                   int(group),
                   cap};
  dim3 grid(unsigned(rows), unsigned(heads), 1);
  const auto on = static_cast<cudaStream_t>(stream);
  switch ((width + kChannels - 1) / kChannels) {
    case 1: estimate<1><<<grid, 32 * kWarps, 0, on>>>(a); break;
    case 2: estimate<2><<<grid, 32 * kWarps, 0, on>>>(a); break;
    case 3: estimate<3><<<grid, 32 * kWarps, 0, on>>>(a); break;
    default: estimate<4><<<grid, 32 * kWarps, 0, on>>>(a); break;
  }
  return int(cudaGetLastError());
}
