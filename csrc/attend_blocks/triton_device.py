"""Device code of `attend_blocks`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import dot, grow, weighted

from kvpress.formulas.block_map import QUERIES

SIZES = ["queries", "slots", "bytes_of_head"]
ROWS = tl.constexpr(QUERIES)


@triton.jit
def computes(computed, begin, j):
    """Whether the map has block j of a row that begins at a byte."""
    byte = tl.load(computed + begin + j // 8).to(tl.int32)
    return (byte >> (j % 8)) & 1 > 0


@triton.jit
def load_transposed(at, s_S, token, inside_S, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of slots, channel-major, zeros beyond the last."""
    d_D = tl.arange(0, BLOCK_D)
    at_DS = at + s_S[None, :] * token + d_D[:, None]
    return tl.load(at_DS, mask=inside_S[None, :] & (d_D[:, None] < WIDTH), other=0.0)


@triton.jit
def load_tokens(at, s_S, token, inside_S, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries or values of tokens, zeros beyond the last."""
    d_D = tl.arange(0, BLOCK_D)
    at_SD = at + s_S[:, None] * token + d_D[None, :]
    return tl.load(at_SD, mask=inside_S[:, None] & (d_D[None, :] < WIDTH), other=0.0)


@triton.jit
def store_lse(lse, own_M, top_M, total_M, real_M):
    """Of an empty sum the logarithm would be -inf too, with a warning where this is interpreted."""
    tl.store(lse + own_M, top_M + tl.log(tl.where(total_M == 0.0, 1.0, total_M)), mask=real_M)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    query, key, value, computed, offset, end, out, lse,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, queries, slots, bytes_of_head, heads, group, scaling,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, WIDE_VALUE: tl.constexpr,
):  # fmt: skip
    """Attends some queries of a block to the blocks of their row of the map."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    row, flat = first // ROWS, tl.program_id(1).to(tl.int64)
    batch, head = flat // heads, flat % heads
    m_M = first + tl.arange(0, BLOCK_M)
    real_M = m_M < queries
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    query_MD = load_tokens(query, m_M, query_token, real_M, WIDTH, BLOCK_D)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    out_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    begin = flat * bytes_of_head + tl.load(offset + row)
    for j in range(tl.load(end + row)):
        if computes(computed, begin, j):
            s_S = j * BLOCK_S + tl.arange(0, BLOCK_S)
            inside_S = s_S < slots
            key_DS = load_transposed(key, s_S, key_token, inside_S, WIDTH, BLOCK_D)
            product_MS = dot(query_MD, key_DS, tl.zeros([BLOCK_M, BLOCK_S], tl.float32), WIDE)
            visible_MS = s_S[None, :] <= (slots - queries + m_M)[:, None]
            logits_MS = tl.where(visible_MS, product_MS * scaling, float("-inf"))
            weight_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
            if VALUE_WIDTH > 0:
                value_SE = load_tokens(value, s_S, value_token, inside_S, VALUE_WIDTH, BLOCK_E)
                out_ME = weighted(weight_MS, value_SE, out_ME * shrink_M[:, None], WIDE_VALUE)
    own_M = flat * queries + m_M
    store_lse(lse, own_M, top_M, total_M, real_M)
    if VALUE_WIDTH > 0:
        e_E = tl.arange(0, BLOCK_E)
        out_ME = (out_ME / tl.where(total_M == 0.0, 1.0, total_M)[:, None]).to(out.dtype.element_ty)
        at_ME = out + own_M[:, None] * VALUE_WIDTH + e_E[None, :]
        tl.store(at_ME, out_ME, mask=real_M[:, None] & (e_E[None, :] < VALUE_WIDTH))
