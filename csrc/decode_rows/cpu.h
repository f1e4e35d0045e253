// Attention of new queries over ragged paged rows. Formula, bytes and numerics: README.md.
//
// A row is cut into chunks of kChunk slots, always at the same places, whatever the batch and the number of threads:
// the result of a row depends on that row alone, to the last bit. Whoever finishes the last chunk of a row joins them.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/tasks.h"
#include "../include/tiles.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kBlock = 64;   // slots between two looks at the running maximum; their keys and values fit in L1
constexpr int64_t kChunk = 512;  // slots of one task

// Calls f with a value of the storage type.
template <class F>
inline void with_storage(Type type, const F& f) {
  if (type == Type::kFloat32) f(float{});
  if (type == Type::kBFloat16) f(BFloat16{});
  if (type == Type::kFloat16) f(Float16{});
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

// Extra is what an operator does besides:
//   before_last_chunk(row)
//   on_logits(row, first query, queries, first slot, slots, logits [queries, kBlock], ahead)
//       of a block, with -inf where a query does not look and up to the next multiple of kTile
//   on_weights(row, query, first slot, slots, exponentials, the logit of which they are relative to)
//   after_row(row, count, LSE of its queries)
template <class E, class Extra>
class RowsAttention {
 public:
  // counts: slots of every row as the queries see them.
  RowsAttention(const DecodeRows& a, const int64_t* counts, Extra& extra) : a_(a), counts_(counts), extra_(extra) {
    rows_ = a.batch * a.heads;
    m_ = a.group * a.queries;
    width_ = a.pages.key_width;
    value_width_ = a.pages.value_width;
    record_ = kOut + value_width_;
  }

  void run(const Threads& threads) {
    int64_t* first = scratch<int64_t, struct FirstChunks>(rows_ + 1);
    int64_t slots = 0;
    first[0] = 0;
    for (int64_t r = 0; r < rows_; r++) {
      first[r + 1] = first[r] + std::max<int64_t>(1, (counts_[r] + kChunk - 1) / kChunk);
      slots += counts_[r];
    }
    const int64_t chunks = first[rows_];
    query_ = scratch<float, struct Queries>(rows_ * m_ * width_);
    partial_ = scratch<float, struct Partials>(chunks * m_ * record_);
    auto* left = scratch<std::atomic<int32_t>, struct Counters>(rows_);
    for (int64_t r = 0; r < rows_; r++) {
      left[r].store(int32_t(first[r + 1] - first[r]), std::memory_order_relaxed);
      read_queries(r);
    }
    const bool worthwhile = slots * (width_ + value_width_) * m_ > 1 << 17;
    const auto chunk_of = [&](int64_t i) {
      const int64_t r = std::upper_bound(first, first + rows_ + 1, i) - first - 1;
      return Chunk{r, (i - first[r]) * kChunk};
    };
    const auto attend = [&](int64_t i, int64_t following) {
      const Chunk chunk = chunk_of(i);
      const int64_t r = chunk.row;
      if (i + 1 == first[r + 1]) extra_.before_last_chunk(r);
      attend_chunk(chunk, chunk_of(following), partial_ + i * m_ * record_);
      if (left[r].fetch_sub(1, std::memory_order_acq_rel) == 1) join(r, first[r], first[r + 1]);
    };
    // Neighbouring chunks together, so that the start of the next one is fetched during the end of the last.
    const int64_t together = std::max<int64_t>(1, chunks / (threads.count * 8));
    share(threads, (chunks + together - 1) / together, worthwhile, [&](int64_t i) {
      const int64_t end = std::min(chunks, (i + 1) * together);
      for (int64_t c = i * together; c < end; c++) attend(c, std::min(c + 1, end - 1));
    });
  }

 private:
  struct Chunk {
    int64_t row, begin;
  };

  // Query m = g·Q + q of row r = b·H + h stands at [b, h·G + g, q], which is [r, m] where that is contiguous.
  int64_t head_of(int64_t r, int64_t m) const { return r % a_.heads * a_.group + m / a_.queries; }

  void read_queries(int64_t r) {
    float* row = scratch<float, struct QueryRow>(width_);
    pack_queries(m_, width_, row, query_ + r * m_ * width_, [&](int64_t m, float* to) {
      const int64_t offset = r / a_.heads * a_.query.batch_stride + head_of(r, m) * a_.query.head_stride +
                             m % a_.queries * a_.query.token_stride;
      read_floats(a_.query.data, a_.query.type, offset, width_, float(a_.logits.scaling), to);
    });
  }

  // The first slot that query m of a row does not see.
  int64_t seen_by(int64_t r, int64_t m) const { return counts_[r] - a_.queries + m % a_.queries + 1; }

  // The tiles of at most kBlock slots.
  struct Block {
    int64_t slots = 0;
    const E *key[kBlock / kTile], *value[kBlock / kTile];
  };

  // A record: the largest logit, the sum of the exponentials relative to it, and their sum times the values.
  static constexpr int64_t kOut = 2;

  void attend_chunk(Chunk chunk, Chunk following, float* records) {
    for (int64_t m = 0; m < m_; m++) {
      float* record = records + m * record_;
      record[0] = -INFINITY;
      std::fill(record + 1, record + record_, 0.0f);
    }
    const int64_t end = std::min(chunk.begin + kChunk, counts_[chunk.row]);
    Block block = find_tiles(chunk.row, chunk.begin);
    for (int64_t s = chunk.begin; s < end; s += kBlock) {
      const bool last = s + kBlock >= end;
      Block next;
      Ahead ahead;
      if (in_place()) {  // where tiles are copied, there is room for one copy, and nothing to fetch ahead
        next = last ? find_tiles(following.row, following.begin) : find_tiles(chunk.row, s + kBlock);
        fetch_meanwhile(next, ahead);
      }
      in_parts(m_, [&](int64_t m, auto M) {
        attend_block<M()>(chunk.row, m, s, block, ahead, records + m * record_);
      });
      if (!last) block = in_place() ? next : find_tiles(chunk.row, s + kBlock);
    }
  }

  void fetch_meanwhile(const Block& next, Ahead& ahead) const {
    if (next.slots <= 0) return;
    const int64_t tiles = (next.slots + kTile - 1) / kTile, item = sizeof(E);
    const int64_t step = std::max<int64_t>(kLine, a_.pages.page_slots * item);  // of the channels of a tile of keys
    for (int i = 0; i < Ahead::kPlaces; i++) {
      const int64_t t = std::min<int64_t>(i, tiles - 1);
      ahead.keys(i, next.key[t], step, a_.pages.page_slots * width_ * item / step);
      ahead.values(i, next.value[t], kLine, kTile * value_width_ * item / kLine);
    }
  }

  bool in_place() const { return a_.pages.page_slots % kTile == 0; }

  // Where the tiles of a block lie: in the pages, or in a copy where pages do not hold whole tiles.
  Block find_tiles(int64_t r, int64_t begin) const {
    Block block;
    block.slots = std::min(kBlock, counts_[r] - begin);
    const int64_t page_slots = a_.pages.page_slots;
    const int32_t* table = a_.pages.table + r * a_.pages.table_width;
    const auto* keys = static_cast<const E*>(a_.pages.key);
    const auto* values = static_cast<const E*>(a_.pages.value);
    if (in_place()) {
      for (int64_t t = 0; t * kTile < block.slots; t++) {
        const int64_t slot = begin + t * kTile, page = table[slot / page_slots], offset = slot % page_slots;
        block.key[t] = keys + page * page_slots * width_ + offset;
        block.value[t] = values + (page * page_slots + offset) * value_width_;
      }
      return block;
    }
    E* copy = scratch<E, struct Copies>(kBlock * (width_ + value_width_));
    for (int64_t i = 0; i < block.slots; i++) {
      const int64_t slot = begin + i, page = table[slot / page_slots], offset = slot % page_slots;
      E* tile = copy + i / kTile * kTile * width_;
      for (int64_t d = 0; d < width_; d++) tile[d * kTile + i % kTile] = keys[(page * width_ + d) * page_slots + offset];
      std::copy_n(values + (page * page_slots + offset) * value_width_, value_width_,
                  copy + kBlock * width_ + i * value_width_);
    }
    for (int64_t t = 0; t * kTile < block.slots; t++) {
      block.key[t] = copy + t * kTile * width_;
      block.value[t] = copy + kBlock * width_ + t * kTile * value_width_;
    }
    return block;
  }

  template <int M>
  void attend_block(int64_t r, int64_t m0, int64_t begin, const Block& block, Ahead& ahead, float* records) {
    alignas(64) float x[M][kBlock];
    const int64_t channel_stride = in_place() ? a_.pages.page_slots : kTile;
    const int64_t padded = (block.slots + kTile - 1) / kTile * kTile;
    for (int64_t t = 0; t * kTile < padded; t++)
      logits_of_tile<M>(query_ + (r * m_ + m0) * width_, block.key[t], channel_stride, width_, x[0] + t * kTile,
                        kBlock, ahead);
    for (int m = 0; m < M; m++) finish_logits(x[m], padded, std::min(block.slots, seen_by(r, m0 + m) - begin));
    extra_.on_logits(r, m0, M, begin, block.slots, x[0], ahead);
    for (int m = 0; m < M; m++) {
      weigh(x[m], padded, records + m * record_, ahead);
      extra_.on_weights(r, m0 + m, begin, block.slots, x[m], records[m * record_]);
    }
    add_all_values<M>(x[0], kBlock, block.value, block.slots, value_width_, records + kOut, record_, ahead);
  }

  void finish_logits(float* x, int64_t padded, int64_t visible) const {
    const float cap = float(a_.logits.softcap);
    for (int64_t i = 0; i < padded && cap != 0.0f; i += kWidth) store(x + i, capped(load(x + i), cap));
    for (int64_t i = std::max<int64_t>(0, visible); i < padded; i++) x[i] = -INFINITY;
  }

  // Turns logits into exponentials relative to the largest logit of the record so far.
  void weigh(float* x, int64_t padded, float* record, Ahead& ahead) const {
    Vec largest = load(x);
    for (int64_t i = kWidth; i < padded; i += kWidth) largest = max(load(x + i), largest);
    const float top = max(largest);
    if (top > record[0]) {
      const float shrink = std::exp(record[0] - top);
      for (int64_t d = 1; d < record_; d++) record[d] *= shrink;
      record[0] = top;
    }
    if (record[0] == -INFINITY) {
      std::fill_n(x, padded, 0.0f);
      return;
    }
    Vec total{};
    ahead.fetch();
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Vec weight = exp(load(x + i) - record[0]);
      total += weight;
      store(x + i, weight);
    }
    record[1] += sum(total);
  }

  void join(int64_t r, int64_t first, int64_t end) {
    float* lse = scratch<float, struct Lse>(m_ + value_width_);
    float* out = lse + m_;
    for (int64_t m = 0; m < m_; m++) {
      float largest = -INFINITY, total = 0;
      for (int64_t i = first; i < end; i++) largest = std::max(largest, partial_[(i * m_ + m) * record_]);
      std::fill_n(out, value_width_, 0.0f);
      for (int64_t i = first; i < end && largest != -INFINITY; i++) {
        const float* record = partial_ + (i * m_ + m) * record_;
        const float share = std::exp(record[0] - largest);
        total += share * record[1];
        for (int64_t d = 0; d < value_width_; d++) out[d] += share * record[kOut + d];
      }
      for (int64_t d = 0; d < value_width_ && total != 0; d++) out[d] /= total;
      lse[m] = largest + std::log(total);
      channels_in_order(static_cast<const E*>(nullptr), out, value_width_);
      write_floats(out, value_width_, a_.out, a_.query.type, (r * m_ + m) * value_width_);
      if (a_.lse) a_.lse[r * m_ + m] = lse[m];
    }
    extra_.after_row(r, counts_[r], lse);
  }

  const DecodeRows& a_;
  const int64_t* counts_;
  Extra& extra_;
  int64_t rows_, m_, width_, value_width_, record_;
  float *query_, *partial_;
};

// Exponentials of all slots, each block relative to a logit of its own, until the row's LSE is known.
struct BlockWeights {
  float* weights;    // [R, M, stride]
  float* reference;  // [R, M, blocks]: the logit, later the factor that makes exponentials weights
  int64_t m, stride, blocks;

  float* row(int64_t r, int64_t query) const { return weights + (r * m + query) * stride; }
  float* references(int64_t r, int64_t query) const { return reference + (r * m + query) * blocks; }

  void keep(int64_t r, int64_t query, int64_t begin, int64_t slots, const float* x, float relative_to) const {
    std::copy_n(x, slots, row(r, query) + begin);
    references(r, query)[begin / kBlock] = relative_to;
  }

  // References become factors: exp(reference − lse).
  void normalise(int64_t r, int64_t query, int64_t slots, float lse) const {
    float* factor = references(r, query);
    for (int64_t k = 0; k * kBlock < slots; k++) factor[k] = lse == -INFINITY ? 0.0f : std::exp(factor[k] - lse);
  }
};

// The weights that decode_rows returns; slots beyond a row's count weigh nothing.
struct Weights {
  BlockWeights kept;  // without memory where no weights are wanted
  void before_last_chunk(int64_t) {}
  void on_logits(int64_t, int64_t, int, int64_t, int64_t, const float*, Ahead&) {}
  void on_weights(int64_t r, int64_t m, int64_t begin, int64_t slots, const float* x, float relative_to) {
    if (kept.weights) kept.keep(r, m, begin, slots, x, relative_to);
  }
  void after_row(int64_t r, int64_t slots, const float* lse) {
    for (int64_t m = 0; m < kept.m && kept.weights; m++) {
      kept.normalise(r, m, slots, lse[m]);
      float* weights = kept.row(r, m);
      for (int64_t s = 0; s < slots; s++) weights[s] *= kept.references(r, m)[s / kBlock];
      std::fill(weights + slots, weights + kept.stride, 0.0f);
    }
  }
};

inline void decode_rows(const DecodeRows& a, const Threads& threads) {
  const int64_t stride = a.pages.table_width * a.pages.page_slots, blocks = (stride + kBlock - 1) / kBlock;
  const int64_t m = a.group * a.queries;
  float* references = a.weights ? scratch<float, struct References>(a.batch * a.heads * m * blocks) : nullptr;
  Weights extra{{a.weights, references, m, stride, blocks}};
  with_storage(a.pages.type, [&](auto storage) {
    RowsAttention<decltype(storage), Weights>(a, a.counts, extra).run(threads);
  });
}

}  // namespace kvpress::KERNEL_ISA
