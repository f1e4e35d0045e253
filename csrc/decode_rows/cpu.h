// Attention of new queries over ragged paged rows. Formula, bytes and numerics: README.md.
//
// A row is cut into chunks of kChunk slots, always at the same places, whatever the batch and the number of threads:
// the result of a row depends on that row alone, to the last bit. Whoever finishes the last chunk of a row joins them,
// unless the operator takes chunks one by one.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/codes.h"
#include "../include/storage.h"
#include "../include/tasks.h"
#include "queries.h"
#include "reader.h"
#include "records.h"
#include "regions.h"
#include "weights.h"

namespace kvpress::KERNEL_ISA {

// Extra is what an operator does besides. Slots are named by their places in the regions:
//   before_last_chunk(row)
//   on_logits(row, first query, queries, first slot, slots, logits [queries, kBlock], ahead)
//       of a block, with -inf where a query does not look and up to the next multiple of kTile
//   on_weights(row, query, first slot, slots, exponentials, the logit of which they are relative to)
//   after_row(row, regions, LSE of its queries), where kJoins; otherwise
//   after_chunk(chunk, records of its queries, numbers of a record)
template <class E, class Extra>
class RowsAttention {
 public:
  RowsAttention(const DecodeRows& a, const Regions& regions, Extra& extra)
      : a_(a), regions_(regions), counts_(regions.counts), extra_(extra), reader_(a, regions.counts),
        queries_(a, regions), rows_(a.batch * a.heads), m_(a.group * a.queries), value_width_(a.pages.value_width),
        record_(kOut + value_width_) {}

  void run(const Threads& threads) {
    const int64_t slots = number_chunks(), kinds = a_.parts + 1, chunks = first_[rows_ * kinds];
    if constexpr (Extra::kJoins) {
      partial_ = scratch<float, struct Partials>(chunks * m_ * record_);
      left_ = scratch<std::atomic<int32_t>, struct Counters>(rows_);
      for (int64_t r = 0; r < rows_; r++)
        left_[r].store(int32_t(first_[(r + 1) * kinds] - first_[r * kinds]), std::memory_order_relaxed);
    }
    const bool worthwhile = slots * (a_.pages.key_width + value_width_) * m_ > 1 << 17;
    // Neighbouring chunks together, so that the start of the next one is fetched during the end of the last.
    const int64_t together = std::max<int64_t>(1, chunks / (threads.count * 8));
    share(threads, (chunks + together - 1) / together, worthwhile, [&](int64_t i) {
      const int64_t end = std::min(chunks, (i + 1) * together);
      Chunk chunk = chunk_of(i * together);
      for (int64_t c = i * together; c < end; c++) {
        const Chunk following = c + 1 < end ? chunk_of(c + 1) : chunk;
        attend(c, chunk, following);
        chunk = following;
      }
    });
  }

 private:
  // Numbers the chunks of all rows and regions, one after the other. Returns how many slots they have.
  int64_t number_chunks() {
    const int64_t kinds = a_.parts + 1;
    first_ = scratch<int64_t, struct FirstChunks>(rows_ * kinds + 1);
    int64_t slots = 0, chunks = first_[0] = 0;
    for (int64_t r = 0, i = 0; r < rows_; r++) {
      const int64_t begin = chunks;
      for (int p = 0; p < kinds; p++) {
        const int64_t count = regions_.count(r, p);
        chunks += (count + kChunk - 1) / kChunk;
        // Somebody must write what a row without slots gives.
        if (Extra::kJoins && p == a_.parts && chunks == begin) chunks++;
        first_[++i] = chunks;
        slots += count;
      }
    }
    return slots;
  }

  Chunk chunk_of(int64_t i) const {
    const int64_t kinds = a_.parts + 1;
    const int64_t at = std::upper_bound(first_, first_ + rows_ * kinds + 1, i) - first_ - 1;
    return Chunk{at / kinds, int(at % kinds), (i - first_[at]) * kChunk};
  }

  // One chunk; what follows is read ahead. Whoever is last with a row joins its chunks, where they are joined.
  void attend(int64_t i, const Chunk& chunk, const Chunk& following) {
    const int64_t kinds = a_.parts + 1, r = chunk.row, begin = first_[r * kinds], end = first_[(r + 1) * kinds];
    float* records = Extra::kJoins ? partial_ + i * m_ * record_ : scratch<float, struct ChunkRecords>(m_ * record_);
    if (i + 1 == end) extra_.before_last_chunk(r);
    if (chunk.region < a_.parts) {
      attend_old_chunk(chunk, following, records);
    } else {
      attend_chunk(chunk, following, records);
    }
    if constexpr (Extra::kJoins) {
      if (left_[r].fetch_sub(1, std::memory_order_acq_rel) == 1) join(r, begin, end);
    } else {
      extra_.after_chunk(chunk, records, record_);
    }
  }

  // The first slot that query m of a row does not see.
  int64_t seen_by(int64_t r, int64_t m) const { return counts_[r] - a_.queries + m % a_.queries + 1; }

  void attend_chunk(Chunk chunk, Chunk following, float* records) {
    clear(records, m_, record_);
    const int64_t end = std::min(chunk.begin + kChunk, counts_[chunk.row]);
    const int64_t place = regions_.begin[a_.parts];
    Block<E> block = reader_.find_tiles(chunk.row, chunk.begin);
    for (int64_t s = chunk.begin; s < end; s += kBlock) {
      const bool last = s + kBlock >= end;
      Block<E> next;
      Ahead ahead;
      if (reader_.in_place()) {  // where tiles are copied, there is room for one copy, and nothing to fetch ahead
        if (!last) next = reader_.find_tiles(chunk.row, s + kBlock);
        if (!last) reader_.fetch(next, ahead);
      }
      if (last && !(following == chunk)) reader_.fetch(following, 0, 1, ahead);
      in_parts(m_, [&](int64_t m, auto M) {
        attend_block<M()>(chunk.row, m, s, place + s, block, ahead, records + m * record_);
      });
      if (!last) block = reader_.in_place() ? next : reader_.find_tiles(chunk.row, s + kBlock);
    }
    for (int64_t m = 0; m < m_; m++)
      channels_in_order(static_cast<const E*>(nullptr), records + m * record_ + kOut, value_width_);
  }

  // The same over old slots: records hold kept channels until the chunk ends.
  void attend_old_chunk(Chunk chunk, Chunk following, float* records) {
    const Part& part = a_.part[chunk.region];
    const int64_t kept_width = part.layout.value_kept, record = kOut + Layout::up(kept_width, kTile);
    float* kept = scratch<float, struct KeptRecords>(m_ * record);
    clear(kept, m_, record);
    const int64_t end = std::min(chunk.begin + kChunk, part.counts[chunk.row]);
    const int64_t span = reader_.span_of(part), blocks = span / kBlock;
    for (int64_t s = chunk.begin, next = s, block = blocks; s < end; s += kBlock, block++) {
      if (block == blocks) block = 0, next += span;
      Ahead ahead;
      if (next < end) reader_.fetch({chunk.row, chunk.region, next}, block, blocks, ahead);
      if (next >= end && !(following == chunk)) reader_.fetch(following, block, blocks, ahead);
      in_parts(m_, [&](int64_t m, auto M) {
        attend_old_block<M()>(chunk.row, chunk.region, m, s, std::min(kBlock, end - s), ahead, kept + m * record,
                              record);
      });
    }
    const int16_t* channel = part.value_channel + chunk.row * part.layout.value_kept;
    for (int64_t m = 0; m < m_; m++) {
      float *from = kept + m * record, *to = records + m * record_;
      if (part.layout.value_bits == 16) channels_in_order(static_cast<const E*>(nullptr), from + kOut, kept_width);
      std::copy_n(from, kept_width == value_width_ ? record_ : kOut, to);
      if (kept_width == value_width_) continue;  // channels ascend: these are all
      std::fill(to + kOut, to + record_, 0.0f);
      for (int64_t u = 0; u < kept_width; u++) to[kOut + channel[u]] = from[kOut + u];
    }
  }

  template <int M>
  void attend_old_block(int64_t r, int p, int64_t m0, int64_t begin, int64_t slots, Ahead& ahead, float* records,
                        int64_t record) {
    const Part& part = a_.part[p];
    const Layout& l = part.layout;
    const int64_t place = regions_.begin[p] + begin, padded = Layout::up(slots, kTile);
    const float cap = float(a_.logits.softcap);
    alignas(64) float x[M][kBlock];
    reader_.each_page(part, r, begin, padded, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
      if (l.key_bits == 16) {
        const E* keys = reinterpret_cast<const E*>(page) + offset;
        const float* query = queries_.kept(r, p, 0) + m0 * l.key_kept;
        for (int64_t t = 0; t < take; t += kTile)
          logits_of_tile<M>(query, keys + t, l.slots, l.key_kept, x[0] + i + t, kBlock, ahead);
      }
      with_bits(l.key_bits, [&](auto bits) {
        page_logits<M, bits()>(l, page, queries_.kept(r, p, m0), Queries::kKept, offset, take, x[0] + i, kBlock, ahead);
      });
    });
    for (int m = 0; m < M; m++) finish_logits(x[m], padded, slots, cap);
    if (part.position) {
      reader_.each_page(part, r, begin, slots, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
        const int32_t* position = part.position + (page - part.page) / l.page_bytes * l.slots + offset;
        for (int64_t s = 0; s < take; s++)
          for (int m = 0; m < M && position[s] < 0; m++) x[m][i + s] = -INFINITY;
      });
    }
    extra_.on_logits(r, m0, M, place, slots, x[0], ahead);
    for (int m = 0; m < M; m++) {
      weigh(x[m], padded, records + m * record, record, ahead);
      extra_.on_weights(r, m0 + m, place, slots, x[m], records[m * record]);
    }
    reader_.each_page(part, r, begin, padded, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
      if (l.value_bits == 16) {
        const E* tile[kBlock / kTile];
        for (int64_t t = 0; t * kTile < take; t++)
          tile[t] = reinterpret_cast<const E*>(page + l.value_codes) + (offset + t * kTile) * l.value_kept;
        add_all_values<M>(x[0] + i, kBlock, tile, take, l.value_kept, records + kOut, record, ahead);
      }
      with_bits(l.value_bits, [&](auto bits) {
        add_page_values<M, bits()>(l, page, x[0] + i, kBlock, offset, take, records + kOut, record, ahead);
      });
    });
  }

  template <int M>
  void attend_block(int64_t r, int64_t m0, int64_t begin, int64_t place, const Block<E>& block, Ahead& ahead,
                    float* records) {
    const float cap = float(a_.logits.softcap);
    alignas(64) float x[M][kBlock];
    const int64_t channel_stride = reader_.in_place() ? a_.pages.page_slots : kTile;
    const int64_t padded = (block.slots + kTile - 1) / kTile * kTile;
    for (int64_t t = 0; t * kTile < padded; t++)
      logits_of_tile<M>(queries_.all(r, m0), block.key[t], channel_stride, a_.pages.key_width, x[0] + t * kTile, kBlock,
                        ahead);
    for (int m = 0; m < M; m++) finish_logits(x[m], padded, std::min(block.slots, seen_by(r, m0 + m) - begin), cap);
    extra_.on_logits(r, m0, M, place, block.slots, x[0], ahead);
    for (int m = 0; m < M; m++) {
      weigh(x[m], padded, records + m * record_, record_, ahead);
      extra_.on_weights(r, m0 + m, place, block.slots, x[m], records[m * record_]);
    }
    add_all_values<M>(x[0], kBlock, block.value, block.slots, value_width_, records + kOut, record_, ahead);
  }

  void join(int64_t r, int64_t first, int64_t end) {
    float* lse = scratch<float, struct Lse>(m_ + value_width_);
    float* out = lse + m_;
    for (int64_t m = 0; m < m_; m++) {
      const float* records = partial_ + (first * m_ + m) * record_;
      lse[m] = join_records(records, end - first, m_ * record_, value_width_, out);
      write_floats(out, value_width_, a_.out, a_.query.type, (r * m_ + m) * value_width_);
      if (a_.lse) a_.lse[r * m_ + m] = lse[m];
    }
    extra_.after_row(r, regions_, lse);
  }

  const DecodeRows& a_;
  const Regions& regions_;
  const int64_t* counts_;
  Extra& extra_;
  Reader<E> reader_;
  Queries queries_;
  int64_t rows_, m_, value_width_, record_;
  int64_t* first_;              // chunk of every row and region
  float* partial_;              // records of every chunk and query
  std::atomic<int32_t>* left_;  // chunks of every row
};

// Where the weights that are returned are kept, as wide as the regions.
inline BlockWeights returned_weights(const DecodeRows& a, const Regions& regions) {
  const int64_t stride = regions.begin[a.parts] + regions.room(a.parts);
  const int64_t m = a.group * a.queries, blocks = (stride + kBlock - 1) / kBlock;
  float* references = a.weights ? scratch<float, struct References>(a.batch * a.heads * m * blocks) : nullptr;
  return {a.weights, references, m, stride, blocks};
}

inline void decode_rows(const DecodeRows& a, const Threads& threads) {
  const Regions regions(a, a.counts);
  Weights extra{returned_weights(a, regions)};
  with_storage(a.pages.type,
               [&](auto storage) { RowsAttention<decltype(storage), Weights>(a, regions, extra).run(threads); });
}

}  // namespace kvpress::KERNEL_ISA
