"""Triton kernels of `decode_rows`: every row is cut into chunks, whose softmaxes are combined.

How many chunks there are depends only on what the host knows; programs beyond a row's count leave
at once. Letters: M = G·Q members of a row's query group, see kvpress/types.py for the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from kvpress.csrc.decode_rows.reference import check
from kvpress.csrc.triton_common import (
    FUSED,
    by_architecture,
    device_of,
    dot,
    finish_logits,
    finite,
    weighted,
    wide,
)
from torch import Tensor

CHUNK = 512  # slots per program and block of members


class Launch(NamedTuple):
    """Launch parameters of `split_kernel`."""

    block_m: int  # members
    block_s: int  # slots
    num_warps: int
    num_stages: int


# Oldest architecture -> (most channels, bytes of a factor) -> parameters.
LAUNCH = {
    80: {
        (64, 2): Launch(16, 64, 4, 3),
        (128, 2): Launch(16, 64, 4, 3),
        (256, 2): Launch(16, 32, 8, 2),
        (64, 4): Launch(16, 32, 4, 2),
        (128, 4): Launch(16, 32, 4, 2),
        (256, 4): Launch(16, 16, 4, 1),
    },
}


def decode_rows(
    query_BNQD: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, E]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, W·S]`.

    The same as the reference. Moves every key and value once per block of 16 members; partial
    outputs add 4·E bytes per member and chunk. Raises OperatorError.
    """
    check(query_BNQD, key_PDS, value_PSE, table_RW, counts_R, softcap)
    slots = table_RW.shape[1] * key_PDS.shape[2]
    weights = query_BNQD.new_empty(
        (*query_BNQD.shape[:3], slots) if need_weights else 0, dtype=torch.float32
    )
    pools = (key_PDS, value_PSE, table_RW, counts_R)
    logits = weights if need_weights else None
    out_BNQE, lse_BNQ = attend(query_BNQD, *pools, scaling, softcap, logits)
    if need_weights:
        members = lse_BNQ.numel() // len(counts_R)
        block = 1024
        with device_of(query_BNQD):
            weights_kernel[(lse_BNQ.numel(), triton.cdiv(slots, block))](
                weights, lse_BNQ, counts_R, slots, members, BLOCK=block, num_warps=4, **FUSED
            )
    return out_BNQE, lse_BNQ, weights


def attend(
    query_BNQD: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    scaling: float,
    softcap: float,
    logits_BNQS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; the logits of occupied slots are written where there is a tensor for them."""
    batch, query_heads, queries, width = query_BNQD.shape
    rows, table_width = table_RW.shape
    page_slots, value_width = key_PDS.shape[2], value_PSE.shape[2]
    members = batch * query_heads * queries // rows
    is_wide = wide(query_BNQD.dtype, key_PDS.dtype)
    launch = by_architecture(LAUNCH, query_BNQD, max(width, value_width), is_wide)
    blocks = triton.cdiv(members, launch.block_m)
    chunk = CHUNK * blocks  # blocks of members are as good as chunks to fill the device
    splits = max(1, triton.cdiv(table_width * page_slots, chunk))
    scratch = {"dtype": torch.float32, "device": query_BNQD.device}
    top = torch.empty(rows, splits, members, **scratch)
    total, part = torch.empty_like(top), torch.empty(*top.shape, value_width, **scratch)
    out = torch.empty(
        batch, query_heads, queries, value_width, dtype=query_BNQD.dtype, device=query_BNQD.device
    )
    lse = torch.empty(batch, query_heads, queries, **scratch)
    with device_of(query_BNQD):
        split_kernel[(rows, splits, blocks)](
            *(query_BNQD, key_PDS, value_PSE, table_RW, counts_R),
            *(top, total, part, top if logits_BNQS is None else logits_BNQS),
            *(scaling, softcap, *query_BNQD.stride(), splits, table_width, chunk, queries),
            HEADS=rows // batch,
            GROUP=members // queries,
            D=width,
            E=value_width,
            PAGE=page_slots,
            WIDE=is_wide,
            CAPPED=softcap != 0,
            KEEPS=logits_BNQS is not None,
            BLOCK_M=launch.block_m,
            BLOCK_S=launch.block_s,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_E=max(16, triton.next_power_of_2(value_width)),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **FUSED,
        )
        combine_kernel[(rows * members,)](
            *(counts_R, top, total, part, out, lse, splits, chunk, members),
            E=value_width,
            BLOCK_E=triton.next_power_of_2(value_width),
            BLOCK_K=16,
            num_warps=4,
            **FUSED,
        )
    return out, lse


# Sizes that change from call to call must not lead to another compilation.
@triton.jit(do_not_specialize=["splits", "table_width", "chunk", "queries"])
def split_kernel(
    query,
    key,
    value,
    table,
    counts,
    top,
    total,
    part,
    logits,
    scaling,
    softcap,
    query_batch,
    query_head,
    query_token,
    query_width,
    splits,
    table_width,
    chunk,
    queries,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Maximum, sum and output of the softmax of one (row, chunk, block of members)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + row).to(tl.int32)
    first = split * chunk
    if first >= count:
        return
    m_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    real_M = m_M < GROUP * queries
    head_M, token_M = row % HEADS * GROUP + m_M // queries, m_M % queries
    from_M = row // HEADS * query_batch + head_M * query_head + token_M.to(tl.int64) * query_token
    query_MD = tl.load(
        query + from_M[:, None] + d_D[None, :] * query_width,
        mask=real_M[:, None] & (d_D < D)[None, :],
        other=0,
    )
    last_M = count - queries + token_M
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    part_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(first, tl.minimum(first + chunk, count), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        # Whole pages are read, because a mask that changes inside a page forbids wide loads. What
        # is not occupied is hidden from the logits, and never read from the values.
        used_S = s_S // PAGE * PAGE < count
        page_S = tl.load(table + row * table_width + s_S // PAGE, mask=used_S, other=0).to(tl.int64)
        key_DS = tl.load(
            key + (page_S * (D * PAGE) + s_S % PAGE)[None, :] + d_D[:, None] * PAGE,
            mask=used_S[None, :] & (d_D < D)[:, None],
            other=0,
        )
        products_MS = dot(query_MD, key_DS, tl.zeros([BLOCK_M, BLOCK_S], tl.float32), WIDE)
        logits_MS = finish_logits(products_MS, scaling, softcap, CAPPED)
        logits_MS = tl.where(s_S[None, :] <= last_M[:, None], logits_MS, float("-inf"))
        if KEEPS:
            tl.store(
                logits
                + (row * (GROUP * queries) + m_M)[:, None] * (table_width * PAGE)
                + s_S[None, :],
                logits_MS,
                mask=real_M[:, None] & (s_S < count)[None, :],
            )
        new_M = tl.maximum(top_M, tl.max(logits_MS, 1))
        weights_MS = tl.exp(logits_MS - finite(new_M)[:, None])
        shrink_M = tl.exp(top_M - finite(new_M))
        top_M, total_M = new_M, total_M * shrink_M + tl.sum(weights_MS, 1)
        value_SE = tl.load(
            value + ((page_S * PAGE + s_S % PAGE) * E)[:, None] + e_E[None, :],
            mask=(s_S < count)[:, None] & (e_E < E)[None, :],
            other=0,
        )
        part_ME = weighted(weights_MS, value_SE, part_ME * shrink_M[:, None], WIDE)
    to_M = (row * splits + split) * (GROUP * queries) + m_M
    tl.store(top + to_M, top_M, mask=real_M)
    tl.store(total + to_M, total_M, mask=real_M)
    tl.store(
        part + to_M[:, None] * E + e_E[None, :],
        part_ME,
        mask=real_M[:, None] & (e_E < E)[None, :],
    )


@triton.jit(do_not_specialize=["splits", "chunk", "members"])
def combine_kernel(
    counts,
    top,
    total,
    part,
    out,
    lse,
    splits,
    chunk,
    members,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output and LSE of one member of a row from those of its chunks."""
    item = tl.program_id(0).to(tl.int64)
    row, member = item // members, item % members
    used = tl.cdiv(tl.load(counts + row).to(tl.int32), chunk)
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
