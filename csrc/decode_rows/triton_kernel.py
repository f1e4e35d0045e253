"""Triton kernels of `decode_rows`: every row is cut into chunks, whose softmaxes are combined.

How many chunks there are depends only on what the host knows; programs beyond a row's count leave
at once. Letters: M = G·Q members of a row's query group, see kvpress/types.py for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from kvpress.csrc.decode_rows.reference import check, check_parts
from kvpress.csrc.decode_rows.triton_device import (
    combine_kernel,
    old_kernel,
    split_kernel,
    weights_kernel,
)
from kvpress.csrc.triton_common import FUSED, by_architecture, device_of, wide
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
