"""Device code of `attention_sums`: normalisers of queries, then the columns."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import FRESH, dot, finish_logits, finite, gumbel, noise_row

from kvpress.formulas.block_map import QUERIES, SLOTS

ROWS, COLUMNS = tl.constexpr(QUERIES), tl.constexpr(SLOTS)
# Sizes that change from prompt to prompt must not lead to another compilation.
SIZES = ["bytes_of_head", "stream", "position_batch", "position_head", "queries", "slots", "summed"]


@triton.jit
def noisy_logits(
    query_MD, key_DS, position_S, s_S, own_M, noise_M, scaling, softcap, coldness, chosen_MS,
    WIDE: tl.constexpr, CAPPED: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Logits with noise and temperature; -inf for slots that a query does not see."""
    zeros_MS = tl.zeros([query_MD.shape[0], key_DS.shape[1]], tl.float32)
    y_MS = finish_logits(dot(query_MD, key_DS, zeros_MS, WIDE), scaling, softcap, CAPPED)
    if NOISE != 0:
        y_MS += gumbel(noise_M[:, None], position_S[None, :])
    seen_MS = (s_S[None, :] <= own_M[:, None]) & (position_S >= 0)[None, :] & chosen_MS
    return tl.where(seen_MS, y_MS * coldness, float("-inf"))


@triton.jit
def chosen(computed, offset, begin, i_M, own_M, s_S, queries, MAPPED: tl.constexpr):
    """Which slots lie in blocks of the map, of those that a query can see; all without a map."""
    visible_MS = s_S[None, :] <= own_M[:, None]
    if not MAPPED:
        return visible_MS
    real_M = i_M < queries
    row_M = tl.load(offset + i_M // ROWS, mask=real_M, other=0)
    column_S = s_S // COLUMNS
    byte_MS = tl.load(
        computed + begin + row_M[:, None] + (column_S // 8)[None, :],
        mask=visible_MS & real_M[:, None],
        other=0,
    ).to(tl.int32)
    return (byte_MS >> (column_S % 8)[None, :]) & 1 != 0


@triton.jit
def load_queries(
    query, head, i_M, stride_n, stride_p, stride_d, queries, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Queries of one head, zeros beyond the last."""
    d_D = tl.arange(0, BLOCK_D)
    at_MD = i_M.to(tl.int64)[:, None] * stride_p + d_D[None, :] * stride_d
    return tl.load(
        query + head * stride_n + at_MD, mask=(i_M < queries)[:, None] & (d_D < D)[None, :], other=0
    )


@triton.jit
def load_keys(key, s_S, stride_s, stride_d, slots, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of one row, channel-major, zeros beyond the last."""
    d_D = tl.arange(0, BLOCK_D)
    at_DS = s_S.to(tl.int64)[None, :] * stride_s + d_D[:, None] * stride_d
    return tl.load(key + at_DS, mask=(d_D < D)[:, None] & (s_S < slots)[None, :], other=0)


@triton.jit
def noise_rows(stream, head, position, own_M, stride, slots, NOISE: tl.constexpr):
    """Where the noise of every query starts; one number if it is the same for all of them."""
    if NOISE == FRESH:
        at_M = own_M.to(tl.int64) * stride
        query_M = tl.maximum(tl.load(position + at_M, mask=own_M < slots, other=0), -1)
        query_M = query_M.to(tl.int32)
    else:
        query_M = tl.full([1], -1, tl.int32)
    return noise_row(stream, head, query_M)


@triton.jit(do_not_specialize=[*SIZES, "chunk"])
def lse_kernel(
    query, key, position, lse, computed, offset, bytes_of_head, scaling, softcap, coldness, stream,
    query_batch, query_head, query_token, query_width, key_batch, key_head, key_slot, key_width,
    position_batch, position_head, position_slot, queries, slots, summed, chunk,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    CAPPED: tl.constexpr, NOISE: tl.constexpr, MAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LSE of a block of queries of one head over one part of the keys."""
    item, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    sequence, head = item // (HEADS * GROUP), item % (HEADS * GROUP)
    query += sequence * query_batch
    key += sequence * key_batch + head // GROUP * key_head
    position += sequence * position_batch + head // GROUP * position_head
    # The last queries see most: they start first.
    m_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_M = queries - summed + m_M
    own_M = slots - queries + i_M
    query_MD = load_queries(
        query, head, i_M, query_head, query_token, query_width, queries, D, BLOCK_D
    )
    noise_M = noise_rows(stream, head, position, own_M, position_slot, slots, NOISE)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    stop = tl.minimum(tl.minimum((split + 1) * chunk, slots), tl.max(own_M, 0) + 1)
    for start in range(split * chunk, stop, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        key_DS = load_keys(key, s_S, key_slot, key_width, slots, D, BLOCK_D)
        at_S = s_S.to(tl.int64) * position_slot
        position_S = tl.load(position + at_S, mask=s_S < slots, other=-1)
        position_S = tl.maximum(position_S, -1).to(tl.int32)
        chosen_MS = chosen(computed, offset, item * bytes_of_head, i_M, own_M, s_S, queries, MAPPED)
        y_MS = noisy_logits(
            query_MD, key_DS, position_S, s_S, own_M, noise_M, scaling, softcap, coldness,
            chosen_MS, WIDE, CAPPED, NOISE,
        )  # fmt: skip
        new_M = tl.maximum(top_M, tl.max(y_MS, 1))
        weights_MS = tl.exp(y_MS - finite(new_M)[:, None])
        total_M = total_M * tl.exp(top_M - finite(new_M)) + tl.sum(weights_MS, 1)
        top_M = new_M
    to_M = (split.to(tl.int64) * tl.num_programs(1) + item) * summed + m_M
    # Of an empty sum the logarithm would be -inf too, with a warning where this is interpreted.
    norm_M = top_M + tl.log(tl.where(total_M == 0, 1.0, total_M))
    tl.store(lse + to_M, norm_M, mask=m_M < summed)


@triton.jit
def joined(so_far_MS, weights_MS, LARGEST: tl.constexpr):
    """The sums or the largest weights with those of other queries. What is no number stays."""
    if LARGEST:
        later_MS = (weights_MS > so_far_MS) | (weights_MS != weights_MS)
        return tl.where(later_MS, weights_MS, so_far_MS)
    return so_far_MS + weights_MS


@triton.jit
def columns(sums_MS, LARGEST: tl.constexpr):
    """The same over all lanes of queries."""
    if LARGEST:  # of a number the difference is 0, otherwise it is none
        return tl.max(sums_MS, 0) + tl.sum(sums_MS - sums_MS, 0)
    return tl.sum(sums_MS, 0)


@triton.jit
def weights_of(
    y_MS, i_M, item, lse, weight, sequence, queries, summed, WEIGHTED: tl.constexpr
):  # fmt: skip
    """The weights of a block of queries."""
    # A query that sees nothing has an LSE of -inf, one that is not there one of +inf.
    from_M = lse + item * summed + i_M - (queries - summed)
    norm_M = tl.load(from_M, mask=i_M < queries, other=float("inf"))
    weights_MS = tl.exp(y_MS - finite(norm_M)[:, None])
    if WEIGHTED:
        own_M = tl.load(weight + sequence * queries + i_M, mask=i_M < queries, other=0)
        weights_MS *= own_M[:, None]
    return weights_MS


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    query, key, position, lse, sums, weight, computed, offset,
    bytes_of_head, scaling, softcap, coldness, stream,
    query_batch, query_head, query_token, query_width, key_batch, key_head, key_slot, key_width,
    position_batch, position_head, position_slot, queries, slots, summed,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    CAPPED: tl.constexpr, NOISE: tl.constexpr, MAPPED: tl.constexpr, LARGEST: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The columns of a block of slots of one query head, over all queries that are asked for."""
    item = tl.program_id(1).to(tl.int64)
    sequence, head = item // (HEADS * GROUP), item % (HEADS * GROUP)
    query += sequence * query_batch
    key += sequence * key_batch + head // GROUP * key_head
    position += sequence * position_batch + head // GROUP * position_head
    s_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    key_DS = load_keys(key, s_S, key_slot, key_width, slots, D, BLOCK_D)
    at_S = s_S.to(tl.int64) * position_slot
    position_S = tl.load(position + at_S, mask=s_S < slots, other=-1)
    position_S = tl.maximum(position_S, -1).to(tl.int32)
    first = tl.maximum(queries - summed, tl.program_id(0) * BLOCK_S - (slots - queries))
    sums_MS = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    for start in range(first, queries, BLOCK_M):
        i_M = start + tl.arange(0, BLOCK_M)
        own_M = slots - queries + i_M
        query_MD = load_queries(
            query, head, i_M, query_head, query_token, query_width, queries, D, BLOCK_D
        )
        noise_M = noise_rows(stream, head, position, own_M, position_slot, slots, NOISE)
        chosen_MS = chosen(computed, offset, item * bytes_of_head, i_M, own_M, s_S, queries, MAPPED)
        y_MS = noisy_logits(
            query_MD, key_DS, position_S, s_S, own_M, noise_M, scaling, softcap, coldness,
            chosen_MS, WIDE, CAPPED, NOISE,
        )  # fmt: skip
        weights_MS = weights_of(y_MS, i_M, item, lse, weight, sequence, queries, summed, WEIGHTED)
        sums_MS = joined(sums_MS, weights_MS, LARGEST)
    tl.store(sums + item * slots + s_S, columns(sums_MS, LARGEST), mask=s_S < slots)
