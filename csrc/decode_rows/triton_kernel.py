"""Triton kernels of `decode_rows`: every row is cut into chunks, whose softmaxes are combined.

How many chunks there are depends only on what the host knows; programs beyond a row's count leave
at once. Letters: M = G·Q members of a row's query group, see kvpress/types.py for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from kvpress.csrc.decode_rows.reference import check, check_parts
from kvpress.csrc.triton_common import (
    FUSED,
    by_architecture,
    device_of,
    dot,
    finish_logits,
    finite,
    grow,
    weighted,
    wide,
)
from kvpress.csrc.unpack.triton_kernel import numbers
from torch import Tensor

from kvpress.formulas.page_layout import LINES, PageLayout, span

OLD_SLOTS = 16  # of a block: pages and groups of keys hold whole ones; more would spill
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
    old: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, E]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, W·S]`.

    The same as the reference. Moves every key and value once per block of 16 members; partial
    outputs add 4·E bytes per member and chunk. Raises OperatorError.
    """
    check(query_BNQD, key_PDS, value_PSE, table_RW, counts_R, scaling, softcap)
    parts = check_parts("decode_rows", old, layouts, query_BNQD, key_PDS, value_PSE, table_RW)
    slots = table_RW.shape[1] * key_PDS.shape[2]
    slots += sum(span(layout, tensors[3].shape[1]) for layout, tensors in parts)
    weights = query_BNQD.new_empty(
        (*query_BNQD.shape[:3], slots) if need_weights else 0, dtype=torch.float32
    )
    pools = (key_PDS, value_PSE, table_RW, counts_R)
    logits = weights if need_weights else None
    out_BNQE, lse_BNQ = attend(query_BNQD, *pools, scaling, softcap, logits, parts)
    if need_weights and parts:
        norm_BNQ1 = lse_BNQ.masked_fill(lse_BNQ == -torch.inf, 0.0)[..., None]
        weights.sub_(norm_BNQ1).exp_()  # what holds no token has a logit of -inf
    elif need_weights:
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
    parts: Sequence[tuple[PageLayout, Sequence[Tensor]]] = (),
) -> tuple[Tensor, Tensor]:
    """Output and LSE; the logits of occupied slots are written where there is a tensor for them.

    With parts of old slots those of all others are written as well: -inf.
    """
    batch, query_heads, queries, width = query_BNQD.shape
    rows, table_width = table_RW.shape
    page_slots, value_width = key_PDS.shape[2], value_PSE.shape[2]
    members = batch * query_heads * queries // rows
    is_wide = wide(query_BNQD.dtype, key_PDS.dtype)
    launch = by_architecture(LAUNCH, query_BNQD, max(width, value_width), is_wide)
    blocks = triton.cdiv(members, launch.block_m)
    chunk = CHUNK * blocks  # blocks of members are as good as chunks to fill the device
    own_splits = max(1, triton.cdiv(table_width * page_slots, chunk))
    columns = [span(layout, tensors[3].shape[1]) for layout, tensors in parts]
    old_splits = [triton.cdiv(width, chunk) for width in columns]
    splits = own_splits + sum(old_splits)
    scratch = {"dtype": torch.float32, "device": query_BNQD.device}
    top = torch.empty(rows, splits, members, **scratch)
    total, part = torch.empty_like(top), torch.empty(*top.shape, value_width, **scratch)
    if parts:  # programs without slots leave these
        top.fill_(-torch.inf)
        total.zero_()
        part.zero_()
    if parts and logits_BNQS is not None:
        logits_BNQS.fill_(-torch.inf)
    all_columns = table_width * page_slots + sum(columns)
    out = torch.empty(
        batch, query_heads, queries, value_width, dtype=query_BNQD.dtype, device=query_BNQD.device
    )
    lse = torch.empty(batch, query_heads, queries, **scratch)
    with device_of(query_BNQD):
        for number, (layout, tensors) in enumerate(parts):
            _attend_old(
                layout,
                tensors,
                query_BNQD,
                (top, total, part, top if logits_BNQS is None else logits_BNQS),
                (rows, old_splits[number], blocks),
                (scaling, softcap),
                (sum(old_splits[:number]), splits, chunk, queries),
                (sum(columns[:number]), all_columns),
                key_PDS.dtype,
                launch.block_m,
                logits_BNQS is not None,
            )
        split_kernel[(rows, own_splits, blocks)](
            *(query_BNQD, key_PDS, value_PSE, table_RW, counts_R),
            *(top, total, part, top if logits_BNQS is None else logits_BNQS),
            *(scaling, softcap, *query_BNQD.stride(), splits, table_width, chunk, queries),
            *(sum(old_splits), sum(columns), all_columns),
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
            ALL=bool(parts),
            E=value_width,
            BLOCK_E=triton.next_power_of_2(value_width),
            BLOCK_K=16,
            num_warps=4,
            **FUSED,
        )
    return out, lse


# Sizes that change from call to call must not lead to another compilation.
@triton.jit(
    do_not_specialize=[
        "splits",
        "table_width",
        "chunk",
        "queries",
        "first_split",
        "first_column",
        "columns",
    ]
)
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
    first_split,
    first_column,
    columns,
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
                + (row * (GROUP * queries) + m_M)[:, None] * columns
                + first_column
                + s_S[None, :],
                logits_MS,
                mask=real_M[:, None] & (s_S < count)[None, :],
            )
        weights_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
        value_SE = tl.load(
            value + ((page_S * PAGE + s_S % PAGE) * E)[:, None] + e_E[None, :],
            mask=(s_S < count)[:, None] & (e_E < E)[None, :],
            other=0,
        )
        part_ME = weighted(weights_MS, value_SE, part_ME * shrink_M[:, None], WIDE)
    to_M = (row * splits + first_split + split) * (GROUP * queries) + m_M
    tl.store(top + to_M, top_M, mask=real_M)
    tl.store(total + to_M, total_M, mask=real_M)
    tl.store(
        part + to_M[:, None] * E + e_E[None, :],
        part_ME,
        mask=real_M[:, None] & (e_E < E)[None, :],
    )


def _attend_old(
    layout: PageLayout,
    tensors: Sequence[Tensor],
    query_BNQD: Tensor,
    results: tuple[Tensor, ...],
    grid: tuple[int, int, int],
    logits: tuple[float, float],
    sizes: tuple[int, int, int, int],
    places: tuple[int, int],
    stored: torch.dtype,
    block_m: int,
    keeps: bool,
) -> None:
    """Partial softmaxes over old slots. sizes: first split, splits, chunk, queries.

    places: the first column of this part in the logits, and all columns.
    """
    pages, key_channels, value_channels, table, counts, position, *_ = tensors
    key_scales, value_codes, value_scales, _ = layout.offsets
    if not grid[1] or not len(pages):
        return
    quantised = min(layout.key_bits, layout.value_bits) < 16
    wide_codes = quantised and max(layout.key_kept, layout.value_kept) > 128
    old_kernel[grid](
        *(query_BNQD, pages.view(torch.int16), pages.view(torch.float16), pages.view(stored)),
        *(key_channels, value_channels, table, counts, position if position.numel() else counts),
        *(*results, *logits, *query_BNQD.stride(), *sizes, *places, table.shape[1]),
        HEADS=grid[0] // query_BNQD.shape[0],
        GROUP=query_BNQD.shape[0] * query_BNQD.shape[1] // grid[0],
        T=layout.key_kept,
        U=layout.value_kept,
        E=layout.value_width,
        PAGE=layout.slots,
        BYTES=layout.page_bytes,
        KEY_BITS=layout.key_bits,
        VALUE_BITS=layout.value_bits,
        KEY_GROUP=layout.key_group,
        VALUE_GROUP=layout.value_group,
        VALUE_GROUPS=layout.value_groups,
        VALUE_BLOCKS=triton.cdiv(layout.value_kept, LINES),
        KEY_SCALES=key_scales // 2,
        VALUE_CODES=value_codes // 2,
        VALUE_SCALES=value_scales // 2,
        ITEM=layout.item_bytes,
        HOLES=bool(position.numel()),
        CAPPED=logits[1] != 0,
        KEEPS=keeps,
        BLOCK_M=block_m,
        BLOCK_S=OLD_SLOTS,
        BLOCK_T=max(16, triton.next_power_of_2(layout.key_kept)),
        BLOCK_U=max(16, triton.next_power_of_2(layout.value_kept)),
        num_warps=8 if wide_codes else 4,
        num_stages=1,
        **FUSED,
    )


@triton.jit(
    do_not_specialize=[
        "first_split",
        "splits",
        "chunk",
        "queries",
        "first_column",
        "columns",
        "table_width",
    ]
)
def old_kernel(
    query,
    words,
    halves,
    stored,
    key_channels,
    value_channels,
    table,
    counts,
    position,
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
    first_split,
    splits,
    chunk,
    queries,
    first_column,
    columns,
    table_width,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    ITEM: tl.constexpr,
    HOLES: tl.constexpr,
    CAPPED: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Maximum, sum and output of the softmax of one (row, chunk of old slots, block of members)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + row).to(tl.int32)
    first = split * chunk
    if first >= count:
        return
    m_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    t_T, u_U = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_U)
    real_M = m_M < GROUP * queries
    head_M, token_M = row % HEADS * GROUP + m_M // queries, m_M % queries
    from_M = row // HEADS * query_batch + head_M * query_head + token_M.to(tl.int64) * query_token
    channel_T = tl.load(key_channels + row * T + t_T, mask=t_T < T, other=0).to(tl.int32)
    query_MT = tl.load(
        query + from_M[:, None] + channel_T[None, :] * query_width,
        mask=real_M[:, None] & (t_T < T)[None, :],
        other=0,
    )
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    part_MU = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
    for start in range(first, tl.minimum(first + chunk, count), BLOCK_S):
        page = tl.load(table + row * table_width + start // PAGE).to(tl.int64)
        s_S = start % PAGE + tl.arange(0, BLOCK_S)
        key_TS = numbers(
            words,
            halves,
            stored,
            page,
            s_S[None, :],
            t_T[:, None],
            (t_T < T)[:, None] & (s_S < PAGE)[None, :],
            KEY_BITS,
            PAGE,
            T,
            BYTES,
            0,
            KEY_SCALES,
            KEY_GROUP,
            PAGE // KEY_GROUP,
            PAGE // 8,
            ITEM,
            True,
        )
        products_MS = dot(query_MT, key_TS, tl.zeros([BLOCK_M, BLOCK_S], tl.float32), True)
        logits_MS = finish_logits(products_MS, scaling, softcap, CAPPED)
        held_S = start + tl.arange(0, BLOCK_S) < count
        if HOLES:
            held_S = held_S & (tl.load(position + page * PAGE + s_S, mask=held_S, other=-1) >= 0)
        logits_MS = tl.where(held_S[None, :], logits_MS, float("-inf"))
        if KEEPS:
            tl.store(
                logits
                + (row * (GROUP * queries) + m_M)[:, None] * columns
                + first_column
                + start
                + tl.arange(0, BLOCK_S)[None, :],
                logits_MS,
                mask=real_M[:, None] & held_S[None, :],
            )
        weights_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
        value_SU = numbers(
            words,
            halves,
            stored,
            page,
            s_S[:, None],
            u_U[None, :],
            held_S[:, None] & (u_U < U)[None, :],
            VALUE_BITS,
            PAGE,
            U,
            BYTES,
            VALUE_CODES,
            VALUE_SCALES,
            VALUE_GROUP,
            VALUE_GROUPS,
            VALUE_BLOCKS,
            ITEM,
            False,
        )
        part_MU = weighted(weights_MS, value_SU, part_MU * shrink_M[:, None], True)
    to_M = (row * splits + first_split + split) * (GROUP * queries) + m_M
    tl.store(top + to_M, top_M, mask=real_M)
    tl.store(total + to_M, total_M, mask=real_M)
    channel_U = tl.load(value_channels + row * U + u_U, mask=u_U < U, other=0).to(tl.int32)
    tl.store(
        part + to_M[:, None] * E + channel_U[None, :],
        part_MU,
        mask=real_M[:, None] & (u_U < U)[None, :],
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
    ALL: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
