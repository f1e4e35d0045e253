"""Device code of `decode_rows`: softmaxes of chunks of a row, and what joins them.

M = G·Q members of a row's query group, U = kept channels of old values, T = of old keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import dot, finish_logits, finite, grow, weighted
from kvpress.csrc.unpack.triton_device import numbers

# Sizes that change from call to call must not lead to another compilation.
SIZES = ["splits", "table_width", "chunk", "queries", "first_split", "first_column", "columns"]


@triton.jit
def chunk_of(counts):
    """The row and the chunk of a program, and how many slots the row has."""
    row = tl.program_id(0).to(tl.int64)
    return row, tl.program_id(1), tl.load(counts + row).to(tl.int32)


@triton.jit
def members(
    row, queries, query_batch, query_head, query_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The members that a program takes, their tokens, and where their queries begin."""
    m_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    head_M, token_M = row % HEADS * GROUP + m_M // queries, m_M % queries
    from_M = row // HEADS * query_batch + head_M * query_head + token_M.to(tl.int64) * query_token
    return m_M, token_M, from_M


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Largest logit, sum and output of nothing."""
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return top_M, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_E], tl.float32)


@triton.jit
def keep_logits(logits, logits_MS, m_M, s_S, row, first_column, columns, all_members, held_S):
    """Writes logits of slots to their columns: those of the part begin at `first_column`."""
    to_MS = (row * all_members + m_M)[:, None] * columns + first_column + s_S[None, :]
    tl.store(logits + to_MS, logits_MS, mask=(m_M < all_members)[:, None] & held_S[None, :])


@triton.jit
def store_chunk(
    top, total, part, top_M, total_M, part_ME, to_M, real_M, e_E, real_E, E: tl.constexpr
):
    """Writes what a chunk found; its output to the channels `e_E`."""
    tl.store(top + to_M, top_M, mask=real_M)
    tl.store(total + to_M, total_M, mask=real_M)
    mask_ME = real_M[:, None] & real_E[None, :]
    tl.store(part + to_M[:, None] * E + e_E[None, :], part_ME, mask=mask_ME)


@triton.jit(do_not_specialize=SIZES)
def split_kernel(
    query, key, value, table, counts, top, total, part, logits, scaling, softcap,
    query_batch, query_head, query_token, query_width,
    splits, table_width, chunk, queries, first_split, first_column, columns,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr, CAPPED: tl.constexpr, KEEPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output of the softmax of one (row, chunk, block of members)."""
    row, split, count = chunk_of(counts)
    first = split * chunk
    if first >= count:
        return
    places = members(row, queries, query_batch, query_head, query_token, HEADS, GROUP, BLOCK_M)
    m_M, token_M, from_M = places
    d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    real_M, real_D, real_E = m_M < GROUP * queries, d_D < D, e_E < E
    at_MD = query + from_M[:, None] + d_D[None, :] * query_width
    query_MD = tl.load(at_MD, mask=real_M[:, None] & real_D[None, :], other=0)
    last_M = count - queries + token_M
    top_M, total_M, part_ME = empty_softmax(BLOCK_M, BLOCK_E)
    for start in range(first, tl.minimum(first + chunk, count), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        # Whole pages are read, because a mask that changes inside a page forbids wide loads. What
        # is not occupied is hidden from the logits, and never read from the values.
        used_S = s_S // PAGE * PAGE < count
        page_S = tl.load(table + row * table_width + s_S // PAGE, mask=used_S, other=0).to(tl.int64)
        at_DS = key + (page_S * (D * PAGE) + s_S % PAGE)[None, :] + d_D[:, None] * PAGE
        key_DS = tl.load(at_DS, mask=used_S[None, :] & real_D[:, None], other=0)
        products_MS = dot(query_MD, key_DS, tl.zeros([BLOCK_M, BLOCK_S], tl.float32), WIDE)
        logits_MS = finish_logits(products_MS, scaling, softcap, CAPPED)
        logits_MS = tl.where(s_S[None, :] <= last_M[:, None], logits_MS, float("-inf"))
        if KEEPS:
            all_members, held_S = GROUP * queries, s_S < count
            keep_logits(
                logits, logits_MS, m_M, s_S, row, first_column, columns, all_members, held_S
            )
        weights_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
        at_SE = value + ((page_S * PAGE + s_S % PAGE) * E)[:, None] + e_E[None, :]
        value_SE = tl.load(at_SE, mask=(s_S < count)[:, None] & real_E[None, :], other=0)
        part_ME = weighted(weights_MS, value_SE, part_ME * shrink_M[:, None], WIDE)
    to_M = (row * splits + first_split + split) * (GROUP * queries) + m_M
    store_chunk(top, total, part, top_M, total_M, part_ME, to_M, real_M, e_E, real_E, E)


@triton.jit
def old_keys(
    words, halves, stored, page, s_S, t_C, T: tl.constexpr, PAGE: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Kept channels of the keys of slots of a page: codes from its first byte on."""
    mask_CS = (t_C < T)[:, None] & (s_S < PAGE)[None, :]
    return numbers(
        words, halves, stored, page, s_S[None, :], t_C[:, None], mask_CS, BITS, PAGE, T, BYTES,
        0, SCALES, GROUP, PAGE // GROUP, PAGE // 8, ITEM, True,
    )  # fmt: skip


@triton.jit
def old_logits(
    query_MC, key_CS, position, page, s_S, held_S, scaling, softcap,
    PAGE: tl.constexpr, HOLES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits of old slots, -inf for those that are dropped; and which ones are held."""
    zeros_MS = tl.zeros([query_MC.shape[0], key_CS.shape[1]], tl.float32)
    logits_MS = finish_logits(dot(query_MC, key_CS, zeros_MS, True), scaling, softcap, CAPPED)
    if HOLES:
        held_S = held_S & (tl.load(position + page * PAGE + s_S, mask=held_S, other=-1) >= 0)
    return tl.where(held_S[None, :], logits_MS, float("-inf")), held_S


@triton.jit(do_not_specialize=SIZES)
def old_kernel(
    query, words, halves, stored, key_channels, value_channels, table, counts, position,
    top, total, part, logits, scaling, softcap, query_batch, query_head, query_token, query_width,
    first_split, splits, chunk, queries, first_column, columns, table_width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, U: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, BYTES: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_SCALES: tl.constexpr, ITEM: tl.constexpr, HOLES: tl.constexpr, CAPPED: tl.constexpr,
    KEEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output of the softmax of one (row, chunk of old slots, block of members)."""
    row, split, count = chunk_of(counts)
    first = split * chunk
    if first >= count:
        return
    places = members(row, queries, query_batch, query_head, query_token, HEADS, GROUP, BLOCK_M)
    m_M, _, from_M = places
    t_C, u_U = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_U)
    real_M = m_M < GROUP * queries
    channel_C = tl.load(key_channels + row * T + t_C, mask=t_C < T, other=0).to(tl.int32)
    at_MC = query + from_M[:, None] + channel_C[None, :] * query_width
    query_MC = tl.load(at_MC, mask=real_M[:, None] & (t_C < T)[None, :], other=0)
    top_M, total_M, part_MU = empty_softmax(BLOCK_M, BLOCK_U)
    for start in range(first, tl.minimum(first + chunk, count), BLOCK_S):
        page = tl.load(table + row * table_width + start // PAGE).to(tl.int64)
        place_S = start + tl.arange(0, BLOCK_S)
        s_S = start % PAGE + tl.arange(0, BLOCK_S)
        key_CS = old_keys(
            words, halves, stored, page, s_S, t_C, T, PAGE, BYTES, KEY_BITS, KEY_SCALES, KEY_GROUP,
            ITEM,
        )  # fmt: skip
        logits_MS, held_S = old_logits(
            query_MC, key_CS, position, page, s_S, place_S < count, scaling, softcap,
            PAGE, HOLES, CAPPED,
        )  # fmt: skip
        if KEEPS:
            keep_logits(
                logits, logits_MS, m_M, place_S, row, first_column, columns, GROUP * queries, held_S
            )
        weights_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
        value_SU = numbers(
            words, halves, stored, page, s_S[:, None], u_U[None, :],
            held_S[:, None] & (u_U < U)[None, :], VALUE_BITS, PAGE, U, BYTES, VALUE_CODES,
            VALUE_SCALES, VALUE_GROUP, VALUE_GROUPS, VALUE_BLOCKS, ITEM, False,
        )  # fmt: skip
        part_MU = weighted(weights_MS, value_SU, part_MU * shrink_M[:, None], True)
    to_M = (row * splits + first_split + split) * (GROUP * queries) + m_M
    channel_U = tl.load(value_channels + row * U + u_U, mask=u_U < U, other=0).to(tl.int32)
    store_chunk(top, total, part, top_M, total_M, part_MU, to_M, real_M, channel_U, u_U < U, E)


@triton.jit(do_not_specialize=["splits", "chunk", "members"])
def combine_kernel(
    counts, top, total, part, out, lse, splits, chunk, members,
    ALL: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Output and LSE of one member of a row from those of its chunks."""
    item = tl.program_id(0).to(tl.int64)
    row, member = item // members, item % members
    used = splits if ALL else tl.cdiv(tl.load(counts + row).to(tl.int32), chunk)
    e_E = tl.arange(0, BLOCK_E)
    best = float("-inf")
    norm = 0.0
    out_E = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, used, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        from_K = (row * splits + k_K) * members + member
        top_K = tl.load(top + from_K, mask=k_K < used, other=float("-inf"))
        total_K = tl.load(total + from_K, mask=k_K < used, other=0)
        part_KE = tl.load(
            part + from_K[:, None] * E + e_E[None, :],
            mask=(k_K < used)[:, None] & (e_E < E)[None, :],
            other=0,
        )
        new = tl.maximum(best, tl.max(top_K, 0))
        factor_K, shrink = tl.exp(top_K - finite(new)), tl.exp(best - finite(new))
        norm = norm * shrink + tl.sum(total_K * factor_K, 0)
        out_E = out_E * shrink + tl.sum(part_KE * factor_K[:, None], 0)
        best = new
    out_E = out_E / tl.where(norm == 0, 1.0, norm)
    tl.store(out + item * E + e_E, out_E, mask=e_E < E)
    # The logarithm of 0 would be -inf too, with a warning where this is interpreted.
    tl.store(lse + item, best + tl.log(tl.where(norm == 0, 1.0, norm)))


@triton.jit(do_not_specialize=["members"])
def weights_kernel(weights, lse, counts, slots, members, BLOCK: tl.constexpr):
    """Weights from logits, in place, and zeros beyond a row's count."""
    item = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + item // members)
    norm = tl.load(lse + item)
    s_S = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_S = tl.load(weights + item * slots + s_S, mask=s_S < count, other=float("-inf"))
    tl.store(weights + item * slots + s_S, tl.exp(logits_S - finite(norm)), mask=s_S < slots)
