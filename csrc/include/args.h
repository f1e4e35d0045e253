// What the binding hands to the kernels: plain pointers, sizes and strides in elements. Letters: see kvpress/types.py.
#pragma once

#include <cstdint>
#include <functional>

#include "block_map.h"

// Whether the compiler and the system know AMX: asking for its registers is a system call.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxint8intrin.h>)
#define KVPRESS_AMX
#endif

namespace kvpress {

enum class Type { kFloat32, kBFloat16, kFloat16 };

// Calls work(i) for i < workers, as far as possible at the same time.
using Parallel = std::function<void(int64_t workers, const std::function<void(int64_t)>& work)>;

struct Threads {
  int64_t count;
  Parallel parallel;
};

// A tensor [B, N, T, D] whose last dimension is contiguous.
struct Heads {
  void* data;
  Type type;
  int64_t batch_stride, head_stride, token_stride;
};

// The pages of one layer: keys [P, D, S], values [P, S, D'].
struct Pages {
  void* key;
  void* value;
  Type type;
  int64_t pages, page_slots, key_width, value_width;
  const int32_t* table;  // [R, W]
  int64_t table_width;
};

// What is kept of every slot beside its key and value.
struct Columns {
  int32_t* position;  // [P, S]
  float* mass;        // [P, S] or null
};

enum class Rank { kMass, kMassPerAge, kPosition };

// Which slots stay: of more than a quota the one that ranks lowest goes. The first and the last tokens are protected.
struct Bounds {
  const int64_t *seen, *quota, *recent, *sink;  // [B], [R], [R], [B]
  Rank rank;
};

// How a page of old slots lies in memory: see kvpress/formulas/page_layout.py.
struct Layout {
  int64_t slots, key_width, value_width, key_kept, value_kept, key_bits, value_bits, key_group, value_group, item_bytes;
  int64_t value_groups, key_scales, value_codes, value_scales, page_bytes;  // follow from the others

  explicit Layout(const int64_t* sizes)
      : slots(sizes[0]), key_width(sizes[1]), value_width(sizes[2]), key_kept(sizes[3]), value_kept(sizes[4]),
        key_bits(sizes[5]), value_bits(sizes[6]), key_group(sizes[7]), value_group(sizes[8]), item_bytes(sizes[9]) {
    value_groups = (value_kept + value_group - 1) / value_group;
    const int64_t keys = key_bits == 16 ? key_kept * slots * item_bytes : bytes((key_kept + 1) / 2, slots, key_bits);
    const int64_t values =
        value_bits == 16 ? slots * value_kept * item_bytes : bytes(slots / 2, value_kept, value_bits);
    key_scales = up(keys, 16);
    value_codes = up(key_scales + (key_bits < 16 ? 4 * key_kept * (slots / key_group) : 0), 16);
    value_scales = up(value_codes + values, 16);
    page_bytes = up(value_scales + (value_bits < 16 ? 4 * value_groups * slots : 0), 16);
  }
  Layout() = default;

  static int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
  // Of pairs of lines, 8 lines to a vector of 16 codes.
  static int64_t bytes(int64_t pairs, int64_t lines, int64_t bits) {
    return up(pairs * up(lines, 8) / 8, 16 / bits) * 2 * bits;
  }
};

// Old slots of all rows, in one format.
struct Part {
  Layout layout;
  uint8_t* page;  // [P, bytes]
  int64_t pages;
  const int16_t *key_channel, *value_channel;  // [R, T], [R, U]
  const int32_t* table;                        // [R, W]
  int64_t table_width;
  const int64_t* counts;  // [R], dropped slots included
  int32_t* position;      // [P, S], -1 where a slot was dropped; or null: none was
  float* mass;            // [P, S] or null
  int64_t* dropped;       // [R] or null
};
constexpr int64_t kChunk = 512;  // slots of a row that are attended to in one task
constexpr int kMostParts = 4;    // ordinary and short rows, each with those that a guard keeps wide

struct Logits {
  double scaling, softcap;
};

struct DecodeRows {
  Heads query;  // [B, N, Q, D]
  Pages pages;
  const int64_t* counts;  // [R]
  int64_t batch, heads, group, queries;
  Logits logits;
  void* out;       // [B, N, Q, D'], contiguous, of the query's type; [J, B, N, Q, D'] in fp32 of chunks
  float* lse;      // [B, N, Q], or [J, B, N, Q] of chunks
  float* weights;  // [B, N, Q, spans of the parts + W·S] or null
  Part part[kMostParts];
  int parts;
};

enum class NoiseKind { kNone, kFrozen, kFresh };

struct Noise {
  NoiseKind kind;
  double tau;
  int64_t seed, layer;
  int64_t first;  // query head of the model that is the first one here
};

struct DecodeStep {
  DecodeRows attend;  // counts are those before the new token
  Heads key, value;   // of the new token: [B, H, 1, D], [B, H, 1, D']
  Columns columns;
  int64_t* counts;  // [R]
  Bounds bounds;
  bool evict;
  Noise noise;
};

// Pairs of channels that positions turn, from `start` on; as many as there are frequencies.
struct Turning {
  const float* frequency;
  int64_t pairs, start;
  bool interleaved;
};

// The rule of merging: see kvpress/formulas/merging.py. counts: whether the last channel of keys is the log of a number.
struct Merging {
  double own, memory, gain;
  bool largest, normalised, together, keys, sinks, counts;
};

struct AbsorbStep {
  Pages pages;
  Columns columns;
  int64_t* counts;  // [R]
  Bounds bounds;
  int64_t batch, heads;
  float* threshold;  // [B]
  Turning turning;
  int64_t width;  // channels of keys that are compared and merged
  Merging merging;
};

// What the weights of the last queries become for a slot: their sum, or the largest of them.
struct Reduction {
  int64_t window;
  bool largest;
  const float* weight;  // [B, Q], by which weights of queries are multiplied before; or null
};

struct AttentionSums {
  Heads query, key;         // [B, N, Q, D], [B, H, S, D]
  const int64_t* position;  // [B, H, S]
  int64_t batch, heads, group, queries, slots, width;
  Logits logits;
  Reduction reduction;
  Noise noise;
  float* sums;  // [B, N, S]
  Heads value;  // [B, H, S, D'], where there is `out`
  int64_t value_width;
  void* out;     // [B, N, Q, D'], contiguous, of the query's type; or null
  BlockMap map;  // the blocks that are attended to; all of them where it has no bytes
};

struct EstimateBlocks {
  const int8_t *query, *key;  // codes [B, N, Q, D], [B, H, S, D]
  const float* query_scale;   // [B, N, Q]
  const float* key_scale;     // [B, H, J, kGroups]
  const float* shift;         // [B, N, S]
  const float* threshold;     // [B, N, Q]
  int64_t batch, heads, group, width, local;
  BlockMap map;
};

struct AttendBlocks {
  Heads query, key, value;  // [B, N, Q, D], [B, H, S, D], [B, H, S, E]
  int64_t batch, heads, group, width, value_width;
  double scaling;
  BlockMap map;
  void* out;   // [B, N, Q, E], contiguous, of the query's type
  float* lse;  // [B, N, Q]
};

struct MatchKeys {
  Heads evicted_key, kept_key;  // [B, H, E, D], [B, H, C, D]
  const bool* allowed;          // [B, H, C]
  int64_t batch, heads, evicted, kept, width;
  float* similarity;  // [B, H, E]
  int64_t* target;    // [B, H, E]
};

struct PackPages {
  Layout layout;
  Type type;
  const void *key, *value;                     // [P, S, D], [P, S, E]; unpacking writes them
  const int16_t *key_channel, *value_channel;  // [P, T], [P, U]
  int64_t pages;
  uint8_t* page;  // [P, bytes]
  bool unpack;
};

struct ChannelScores {
  Heads query, key;  // [B, N, W, D], [B, H, S, D]
  const bool* held;  // [B, H, S]
  int64_t batch, heads, group, queries, slots, width;
  float* scores;  // [B, H, D]
};

struct CopySlots {
  void* pool;              // [P, S, width], or [P, width, S] where slot_last
  const int64_t* address;  // [N]: page · S + slot
  void* slots;             // [N, width]
  int64_t count, width, page_slots, item_bytes;
  bool slot_last, gather;  // gather: from the pool, otherwise into it
};

// Outputs of parts of the slots, and the logarithms of the sums of their exponentials; items are queries of heads.
struct JoinParts {
  const float *part, *part_lse;  // [J, items, E], [J, items]
  int64_t parts, items, width;
  float *out, *lse;  // [items, E], [items]
};

// A range of a file, its place in an arena, and the XXH3-128 that is expected of a part of it: a row of `reads_AX`.
struct Read {
  int64_t offset, length, place, begin, checked;
  uint64_t low, high;
};

struct ReadRecords {
  int fd;
  const Read* reads;
  int64_t count;
  uint8_t* arena;
  int64_t* status;  // [count]
};

// Ranges of a list of bytes, `width` each, and the rows of a target [P, width] that they go to.
struct CopyRanges {
  uint8_t* target;
  const int64_t* to;  // [count]
  const uint8_t* source;
  const int64_t* begin;  // [count]
  int64_t count, width;
};

struct Kernels {
  void (*decode_rows)(const DecodeRows&, const Threads&);
  void (*attend_parts)(const DecodeRows&, const Threads&);
  void (*decode_step)(const DecodeStep&, const Threads&);
  void (*absorb_step)(const AbsorbStep&, const Threads&);
  void (*attention_sums)(const AttentionSums&, const Threads&);
  void (*estimate_blocks)(const EstimateBlocks&, const Threads&);
  void (*attend_blocks)(const AttendBlocks&, const Threads&);
  void (*match_keys)(const MatchKeys&, const Threads&);
  void (*copy_slots)(const CopySlots&, const Threads&);
  void (*pack_pages)(const PackPages&, const Threads&);
  void (*channel_scores)(const ChannelScores&, const Threads&);
  void (*join_parts)(const JoinParts&, const Threads&);
  void (*read_records)(const ReadRecords&, const Threads&);
  void (*page_bounds)(const struct PageBounds&, const Threads&);
  void (*score_pages)(const struct ScorePages&, const Threads&);
  void (*choose_pages)(const struct ChoosePages&, const Threads&);
  void (*missed_mass)(const struct MissedMass&, const Threads&);
  void (*search_pages)(const struct SearchPages&, const Threads&);
  void (*score_cells)(const struct ScoreCells&, const Threads&);
  void (*copy_ranges)(const CopyRanges&, const Threads&);
  void (*decode_steps)(const DecodeStep*, int64_t count, const Threads&);
};

}  // namespace kvpress
