// Attention of new queries over ragged paged rows. Formula, bytes and numerics: README.md.
//
// A row is cut into chunks of kChunk slots, always at the same places, whatever the batch and the number of threads:
// the result of a row depends on that row alone, to the last bit. Whoever finishes the last chunk of a row joins them.
#pragma once

#include <algorithm>
#include <cmath>

#include "../include/codes.h"
#include "../include/storage.h"
#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

constexpr int64_t kBlock = 64;   // slots between two looks at the running maximum; their keys and values fit in L1
constexpr int64_t kChunk = 512;  // slots of one task

// The places of slots in what is kept per slot: parts of old slots first, each from a multiple of kBlock on, then the
// pages of the store's own numbers.
struct Regions {
  const DecodeRows& a;
  const int64_t* counts;  // slots of every row in the last region, as the queries see them
  int64_t begin[kMostParts + 2];

  Regions(const DecodeRows& a, const int64_t* counts) : a(a), counts(counts) {
    begin[0] = 0;
    for (int p = 0; p < a.parts; p++)
      begin[p + 1] = begin[p] + Layout::up(a.part[p].table_width * a.part[p].layout.slots, kBlock);
  }

  int64_t count(int64_t r, int p) const { return p < a.parts ? a.part[p].counts[r] : counts[r]; }

  // Which region a place is in.
  int of(int64_t place) const {
    int p = 0;
    while (p < a.parts && place >= begin[p + 1]) p++;
    return p;
  }
};

// Extra is what an operator does besides. Slots are named by their places in the regions:
//   before_last_chunk(row)
//   on_logits(row, first query, queries, first slot, slots, logits [queries, kBlock], ahead)
//       of a block, with -inf where a query does not look and up to the next multiple of kTile
//   on_weights(row, query, first slot, slots, exponentials, the logit of which they are relative to)
//   after_row(row, regions, LSE of its queries)
template <class E, class Extra>
class RowsAttention {
 public:
  RowsAttention(const DecodeRows& a, const Regions& regions, Extra& extra)
      : a_(a), regions_(regions), counts_(regions.counts), extra_(extra) {
    rows_ = a.batch * a.heads;
    m_ = a.group * a.queries;
    width_ = a.pages.key_width;
    value_width_ = a.pages.value_width;
    record_ = kOut + value_width_;
  }

  void run(const Threads& threads) {
    const int64_t regions = a_.parts + 1;
    int64_t* first = scratch<int64_t, struct FirstChunks>(rows_ * regions + 1);  // of every row and region
    int64_t slots = 0;
    first[0] = 0;
    for (int64_t i = 0; i < rows_ * regions; i++) {
      const int64_t count = regions_.count(i / regions, int(i % regions));
      const bool last = i % regions == a_.parts;  // has a chunk, however few slots there are
      first[i + 1] = first[i] + std::max<int64_t>(last, (count + kChunk - 1) / kChunk);
      slots += count;
    }
    const int64_t chunks = first[rows_ * regions];
    query_ = scratch<float, struct Queries>(rows_ * m_ * width_);
    partial_ = scratch<float, struct Partials>(chunks * m_ * record_);
    auto* left = scratch<std::atomic<int32_t>, struct Counters>(rows_);
    for (int64_t r = 0; r < rows_; r++) {
      left[r].store(int32_t(first[(r + 1) * regions] - first[r * regions]), std::memory_order_relaxed);
      read_queries(r);
    }
    if (a_.parts) kept_queries_ = scratch<float, struct KeptQueries>(rows_ * a_.parts * m_ * kKept);
    for (int64_t i = 0; i < rows_ * a_.parts; i++) read_kept_queries(i / a_.parts, int(i % a_.parts));
    const bool worthwhile = slots * (width_ + value_width_) * m_ > 1 << 17;
    const auto chunk_of = [&](int64_t i) {
      const int64_t at = std::upper_bound(first, first + rows_ * regions + 1, i) - first - 1;
      return Chunk{at / regions, int(at % regions), (i - first[at]) * kChunk};
    };
    const auto attend = [&](int64_t i, int64_t following) {
      const Chunk chunk = chunk_of(i);
      const int64_t r = chunk.row, begin = first[r * regions], end = first[(r + 1) * regions];
      float* records = partial_ + i * m_ * record_;
      if (i + 1 == end) extra_.before_last_chunk(r);
      if (chunk.region < a_.parts) {
        attend_old_chunk(chunk, chunk_of(following), records);
      } else {
        attend_chunk(chunk, chunk_of(following), records);
      }
      if (left[r].fetch_sub(1, std::memory_order_acq_rel) == 1) join(r, begin, end);
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
    int64_t row;
    int region;
    int64_t begin;

    bool operator==(const Chunk& other) const {
      return row == other.row && region == other.region && begin == other.begin;
    }
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

  static constexpr int64_t kKept = 256;  // floats of a query for kept channels

  float* kept_query(int64_t r, int p, int64_t m) const { return kept_queries_ + ((r * a_.parts + p) * m_ + m) * kKept; }

  // The channels that a part of old slots keeps; as logits_of_tile takes them where its keys are not quantised.
  void read_kept_queries(int64_t r, int p) {
    const Part& part = a_.part[p];
    const int16_t* channel = part.key_channel + r * part.layout.key_kept;
    float* row = scratch<float, struct QueryRow>(width_);
    const auto read = [&](int64_t m, float* to) {
      const int64_t offset = r / a_.heads * a_.query.batch_stride + head_of(r, m) * a_.query.head_stride +
                             m % a_.queries * a_.query.token_stride;
      read_floats(a_.query.data, a_.query.type, offset, width_, float(a_.logits.scaling), row);
      for (int64_t c = 0; c < part.layout.key_kept; c++) to[c] = row[channel[c]];
    };
    if (part.layout.key_bits == 16) {
      alignas(64) float kept[kKept];
      pack_queries(m_, part.layout.key_kept, kept, kept_query(r, p, 0), read);
    } else {
      for (int64_t m = 0; m < m_; m++) read(m, kept_query(r, p, m));
    }
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
    const int64_t place = regions_.begin[a_.parts];
    Block block = find_tiles(chunk.row, chunk.begin);
    for (int64_t s = chunk.begin; s < end; s += kBlock) {
      const bool last = s + kBlock >= end;
      Block next;
      Ahead ahead;
      if (in_place()) {  // where tiles are copied, there is room for one copy, and nothing to fetch ahead
        if (!last) next = find_tiles(chunk.row, s + kBlock);
        if (!last) fetch_meanwhile(next, ahead);
      }
      if (last && !(following == chunk)) fetch_meanwhile(following, 0, 1, ahead);
      in_parts(m_, [&](int64_t m, auto M) {
        attend_block<M()>(chunk.row, m, s, place + s, block, ahead, records + m * record_);
      });
      if (!last) block = in_place() ? next : find_tiles(chunk.row, s + kBlock);
    }
    for (int64_t m = 0; m < m_; m++)
      channels_in_order(static_cast<const E*>(nullptr), records + m * record_ + kOut, value_width_);
  }

  // The same over old slots: records hold kept channels until the chunk ends.
  void attend_old_chunk(Chunk chunk, Chunk following, float* records) {
    const Part& part = a_.part[chunk.region];
    const int64_t kept_width = part.layout.value_kept, record = kOut + Layout::up(kept_width, kTile);
    float* kept = scratch<float, struct KeptRecords>(m_ * record);
    std::fill_n(kept, m_ * record, 0.0f);
    for (int64_t m = 0; m < m_; m++) kept[m * record] = -INFINITY;
    const int64_t end = std::min(chunk.begin + kChunk, part.counts[chunk.row]);
    const int64_t span = span_of(part), blocks = span / kBlock;
    for (int64_t s = chunk.begin, next = s, block = blocks; s < end; s += kBlock, block++) {
      if (block == blocks) block = 0, next += span;
      Ahead ahead;
      if (next < end) fetch_meanwhile({chunk.row, chunk.region, next}, block, blocks, ahead);
      if (next >= end && !(following == chunk)) fetch_meanwhile(following, block, blocks, ahead);
      in_parts(m_, [&](int64_t m, auto M) {
        attend_old_block<M()>(chunk.row, chunk.region, m, s, std::min(kBlock, end - s), ahead, kept + m * record, record);
      });
    }
    const int16_t* channel = part.value_channel + chunk.row * part.layout.value_kept;
    for (int64_t m = 0; m < m_; m++) {
      float *from = kept + m * record, *to = records + m * record_;
      if (part.layout.value_bits == 16) channels_in_order(static_cast<const E*>(nullptr), from + kOut, kept_width);
      std::copy_n(from, kOut, to);
      std::fill(to + kOut, to + record_, 0.0f);
      for (int64_t u = 0; u < part.layout.value_kept; u++) to[kOut + channel[u]] = from[kOut + u];
    }
  }

  const uint8_t* page_of(const Part& part, int64_t r, int64_t slot) const {
    return part.page + part.table[r * part.table_width + slot / part.layout.slots] * part.layout.page_bytes;
  }

  // Slots of neighbouring pages that are fetched together: a block, or a page that lasts for several.
  static int64_t span_of(const Part& part) { return std::max(part.layout.slots, kBlock); }

  // Meanwhile what is read next is fetched, a piece of it during each of `pieces` blocks, from kLines places at a time.
  void fetch_meanwhile(Chunk next, int64_t piece, int64_t pieces, Ahead& ahead) const {
    if (next.region == a_.parts) {
      if (in_place() && piece == 0) fetch_meanwhile(find_tiles(next.row, next.begin), ahead);
      return;
    }
    const Part& part = a_.part[next.region];
    const int64_t size = part.layout.slots, pages = span_of(part) / size, places = Ahead::kLines / pages;
    const int64_t lines = part.layout.page_bytes / (kLine * places * pieces) + 1;
    for (int64_t i = 0, k = 0; k < pages; k++, next.begin += size) {
      if (next.begin >= part.counts[next.row]) next.begin -= size;  // the last page once more
      const uint8_t* from = page_of(part, next.row, next.begin) + piece * lines * kLine;
      for (int64_t j = 0; j < places; j++, i++, from += pieces * lines * kLine) ahead.place(int(i), from, kLine, lines);
    }
  }

  // Calls f(page, offset in it, slots, slots before) for the pages of some neighbouring slots.
  template <class F>
  void each_page(const Part& part, int64_t r, int64_t begin, int64_t slots, const F& f) const {
    for (int64_t i = 0; i < slots;) {
      const int64_t offset = (begin + i) % part.layout.slots, take = std::min(part.layout.slots - offset, slots - i);
      f(page_of(part, r, begin + i), offset, take, i);
      i += take;
    }
  }

  template <int M>
  void attend_old_block(int64_t r, int p, int64_t m0, int64_t begin, int64_t slots, Ahead& ahead, float* records,
                        int64_t record) {
    const Part& part = a_.part[p];
    const Layout& l = part.layout;
    const int64_t place = regions_.begin[p] + begin, padded = Layout::up(slots, kTile);
    alignas(64) float x[M][kBlock];
    each_page(part, r, begin, padded, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
      if (l.key_bits == 16) {
        const E* keys = reinterpret_cast<const E*>(page) + offset;
        const float* query = kept_query(r, p, 0) + m0 * l.key_kept;
        for (int64_t t = 0; t < take; t += kTile)
          logits_of_tile<M>(query, keys + t, l.slots, l.key_kept, x[0] + i + t, kBlock, ahead);
      }
      with_bits(l.key_bits, [&](auto bits) {
        page_logits<M, bits()>(l, page, kept_query(r, p, m0), kKept, offset, take, x[0] + i, kBlock, ahead);
      });
    });
    for (int m = 0; m < M; m++) finish_logits(x[m], padded, slots);
    if (part.position) {
      each_page(part, r, begin, slots, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
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
    each_page(part, r, begin, padded, [&](const uint8_t* page, int64_t offset, int64_t take, int64_t i) {
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
  void attend_block(int64_t r, int64_t m0, int64_t begin, int64_t place, const Block& block, Ahead& ahead, float* records) {
    alignas(64) float x[M][kBlock];
    const int64_t channel_stride = in_place() ? a_.pages.page_slots : kTile;
    const int64_t padded = (block.slots + kTile - 1) / kTile * kTile;
    for (int64_t t = 0; t * kTile < padded; t++)
      logits_of_tile<M>(query_ + (r * m_ + m0) * width_, block.key[t], channel_stride, width_, x[0] + t * kTile,
                        kBlock, ahead);
    for (int m = 0; m < M; m++) finish_logits(x[m], padded, std::min(block.slots, seen_by(r, m0 + m) - begin));
    extra_.on_logits(r, m0, M, place, block.slots, x[0], ahead);
    for (int m = 0; m < M; m++) {
      weigh(x[m], padded, records + m * record_, record_, ahead);
      extra_.on_weights(r, m0 + m, place, block.slots, x[m], records[m * record_]);
    }
    add_all_values<M>(x[0], kBlock, block.value, block.slots, value_width_, records + kOut, record_, ahead);
  }

  void finish_logits(float* x, int64_t padded, int64_t visible) const {
    const float cap = float(a_.logits.softcap);
    for (int64_t i = 0; i < padded && cap != 0.0f; i += kWidth) store(x + i, capped(load(x + i), cap));
    for (int64_t i = std::max<int64_t>(0, visible); i < padded; i++) x[i] = -INFINITY;
  }

  // Turns logits into exponentials relative to the largest logit of the record so far.
  void weigh(float* x, int64_t padded, float* record, int64_t size, Ahead& ahead) const {
    Vec largest = load(x);
    for (int64_t i = kWidth; i < padded; i += kWidth) largest = max(load(x + i), largest);
    const float top = max(largest);
    if (top > record[0]) {
      const float shrink = std::exp(record[0] - top);
      for (int64_t d = 1; d < size; d++) record[d] *= shrink;
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
      write_floats(out, value_width_, a_.out, a_.query.type, (r * m_ + m) * value_width_);
      if (a_.lse) a_.lse[r * m_ + m] = lse[m];
    }
    extra_.after_row(r, regions_, lse);
  }

  const DecodeRows& a_;
  const Regions& regions_;
  const int64_t* counts_;
  Extra& extra_;
  int64_t rows_, m_, width_, value_width_, record_;
  float *query_, *kept_queries_ = nullptr, *partial_;
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
  void normalise(int64_t r, int64_t query, const Regions& regions, float lse) const {
    for (int p = 0; p <= regions.a.parts; p++) {
      float* factor = references(r, query) + regions.begin[p] / kBlock;
      for (int64_t k = 0; k * kBlock < regions.count(r, p); k++)
        factor[k] = lse == -INFINITY ? 0.0f : std::exp(factor[k] - lse);
    }
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
  void after_row(int64_t r, const Regions& regions, const float* lse) {
    for (int64_t m = 0; m < kept.m && kept.weights; m++) {
      kept.normalise(r, m, regions, lse[m]);
      for (int p = 0; p <= regions.a.parts; p++) {
        const int64_t begin = regions.begin[p], end = begin + regions.count(r, p);
        float* weights = kept.row(r, m);
        for (int64_t s = begin; s < end; s++) weights[s] *= kept.references(r, m)[s / kBlock];
        std::fill(weights + end, weights + (p < regions.a.parts ? regions.begin[p + 1] : kept.stride), 0.0f);
      }
    }
  }
};

inline void decode_rows(const DecodeRows& a, const Threads& threads) {
  const Regions regions(a, a.counts);
  const int64_t stride = regions.begin[a.parts] + a.pages.table_width * a.pages.page_slots;
  const int64_t m = a.group * a.queries, blocks = (stride + kBlock - 1) / kBlock;
  float* references = a.weights ? scratch<float, struct References>(a.batch * a.heads * m * blocks) : nullptr;
  Weights extra{{a.weights, references, m, stride, blocks}};
  with_storage(a.pages.type, [&](auto storage) {
    RowsAttention<decltype(storage), Weights>(a, regions, extra).run(threads);
  });
}

}  // namespace kvpress::KERNEL_ISA
