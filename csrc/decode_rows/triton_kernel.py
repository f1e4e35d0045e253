"""Triton kernels of `decode_rows`: every row is cut into chunks, whose softmaxes are combined.

How many chunks there are depends only on what the host knows; programs beyond a row's count leave
at once. Letters: M = G·Q members of a row's query group, see kvpress/types.py for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from kvpress.csrc.decode_rows import Operands
from kvpress.csrc.decode_rows.reference import OldPart, check, check_parts
from kvpress.csrc.decode_rows.triton_device import (
    combine_kernel,
    old_kernel,
    split_kernel,
    weights_kernel,
)
from kvpress.csrc.triton_common import FUSED, by_architecture, device_of, wide
from torch import Tensor

from kvpress.formulas.page_layout import LINES, PageLayout, span
from kvpress.ops.operands import Logits, Pages

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


class Plan(NamedTuple):
    """How rows are cut: how many chunks, and columns of logits, the parts and the others have."""

    launch: Launch
    blocks: int  # of members
    chunk: int  # slots
    joins: bool
    old_splits: list[int]
    own_splits: int
    old_columns: list[int]
    own_columns: int

    @property
    def splits(self) -> int:
        """Chunks of a row."""
        return sum(self.old_splits) + self.own_splits

    @property
    def columns(self) -> int:
        """Logits of a query."""
        return sum(self.old_columns) + self.own_columns


class Partials(NamedTuple):
    """Softmaxes of chunks: the largest logit, the sum and the output; and logits, or anything."""

    top_RKM: Tensor
    total_RKM: Tensor
    part_RKME: Tensor
    logits: Tensor


def decode_rows(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, E]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, W·S]`.

    The same as the reference. Moves every key and value once per block of 16 members; partial
    outputs add 4·E bytes per member and chunk. Raises OperatorError.
    """
    query_BNQD, pages, logits, need_weights, old = operands
    check("decode_rows", query_BNQD, pages, logits)
    parts = check_parts("decode_rows", old, query_BNQD, pages)
    slots = pages.table_RW.shape[1] * pages.key_PDS.shape[2]
    slots += sum(span(layout, tensors[3].shape[1]) for layout, tensors in parts)
    weights = query_BNQD.new_empty(
        (*query_BNQD.shape[:3], slots) if need_weights else 0, dtype=torch.float32
    )
    out_BNQE, lse_BNQ = attend(query_BNQD, pages, logits, weights if need_weights else None, parts)
    if need_weights and parts:
        norm_BNQ1 = lse_BNQ.masked_fill(lse_BNQ == -torch.inf, 0.0)[..., None]
        weights.sub_(norm_BNQ1).exp_()  # what holds no token has a logit of -inf
    elif need_weights:
        members = lse_BNQ.numel() // len(pages.counts_R)
        block = 1024
        with device_of(query_BNQD):
            weights_kernel[(lse_BNQ.numel(), triton.cdiv(slots, block))](
                weights, lse_BNQ, pages.counts_R, slots, members, BLOCK=block, num_warps=4, **FUSED
            )
    return out_BNQE, lse_BNQ, weights


def attend(
    query_BNQD: Tensor,
    pages: Pages,
    logits: Logits,
    logits_BNQS: Tensor | None,
    parts: Sequence[OldPart] = (),
) -> tuple[Tensor, Tensor]:
    """Output and LSE; the logits of occupied slots are written where there is a tensor for them.

    With parts of old slots those of all others are written as well: -inf.
    """
    plan = plan_of(query_BNQD, pages, parts)
    partials = attend_chunks(query_BNQD, pages, logits, logits_BNQS, parts, plan)
    batch, query_heads, queries, _ = query_BNQD.shape
    value_width, (rows, _, members) = pages.value_PSE.shape[2], partials.top_RKM.shape
    out = query_BNQD.new_empty(batch, query_heads, queries, value_width)
    lse = partials.top_RKM.new_empty(batch, query_heads, queries)
    with device_of(query_BNQD):
        combine_kernel[(rows * members,)](
            *(pages.counts_R, *partials[:3], out, lse, plan.splits, plan.chunk, members),
            ALL=bool(parts),
            E=value_width,
            BLOCK_E=triton.next_power_of_2(value_width),
            BLOCK_K=16,
            num_warps=4,
            **FUSED,
        )
    return out, lse


def attend_chunks(
    query_BNQD: Tensor,
    pages: Pages,
    logits: Logits,
    logits_BNQS: Tensor | None,
    parts: Sequence[OldPart],
    plan: Plan,
) -> Partials:
    """Partial softmaxes over all chunks, and their logits where there is a tensor for them.

    Where chunks are not joined, or old slots are among them, those that a row does not reach have a
    largest logit of -inf, and so have slots that it does not hold.
    """
    batch, query_heads, queries, _ = query_BNQD.shape
    rows, value_width = len(pages.table_RW), pages.value_PSE.shape[2]
    members = batch * query_heads * queries // rows
    top = query_BNQD.new_empty(rows, plan.splits, members, dtype=torch.float32)
    kept = top if logits_BNQS is None else logits_BNQS
    partials = Partials(top, torch.empty_like(top), top.new_empty(*top.shape, value_width), kept)
    if parts or not plan.joins:  # programs without slots leave these
        kept.fill_(-torch.inf)
        top.fill_(-torch.inf)
    if parts:  # channels that a part does not keep are left, and so is what no program reaches
        partials.total_RKM.zero_()
        partials.part_RKME.zero_()
    keeps = logits_BNQS is not None
    with device_of(query_BNQD):
        for number, old in enumerate(parts):
            if len(old[1][0]) and plan.old_splits[number]:
                _attend_old(old, number, query_BNQD, pages, logits, partials, plan, keeps)
        if plan.own_splits:
            _attend_own(query_BNQD, pages, logits, partials, plan, keeps)
    return partials


def plan_of(query_BNQD: Tensor, pages: Pages, parts: Sequence[OldPart], joins: bool = True) -> Plan:
    """How rows are cut. Chunks that are not joined have `CHUNK` slots, however many members."""
    batch, query_heads, queries, width = query_BNQD.shape
    rows, table_width = pages.table_RW.shape
    is_wide = wide(query_BNQD.dtype, pages.key_PDS.dtype)
    widest = max(width, pages.value_PSE.shape[2])
    launch = by_architecture(LAUNCH, query_BNQD, widest, is_wide)
    blocks = triton.cdiv(batch * query_heads * queries // rows, launch.block_m)
    # Blocks of members are as good as chunks to fill the device.
    chunk = CHUNK * blocks if joins else CHUNK
    own_columns = table_width * pages.key_PDS.shape[2]
    old_columns = [span(layout, tensors[3].shape[1]) for layout, tensors in parts]
    old_splits = [triton.cdiv(columns, chunk) for columns in old_columns]
    own_splits = max(int(joins), triton.cdiv(own_columns, chunk))
    return Plan(launch, blocks, chunk, joins, old_splits, own_splits, old_columns, own_columns)


def _attend_own(
    query_BNQD: Tensor,
    pages: Pages,
    logits: Logits,
    partials: Partials,
    plan: Plan,
    keeps: bool,
) -> None:
    """Partial softmaxes over the slots in pages of the store's dtype."""
    batch, query_heads, queries, width = query_BNQD.shape
    (rows, table_width), launch = pages.table_RW.shape, plan.launch
    value_width = pages.value_PSE.shape[2]
    split_kernel[(rows, plan.own_splits, plan.blocks)](
        *(query_BNQD, *pages, *partials, *logits, *query_BNQD.stride()),
        *(plan.splits, table_width, plan.chunk, queries),
        *(sum(plan.old_splits), sum(plan.old_columns), plan.columns),
        HEADS=rows // batch,
        GROUP=batch * query_heads // rows,
        D=width,
        E=value_width,
        PAGE=pages.key_PDS.shape[2],
        WIDE=wide(query_BNQD.dtype, pages.key_PDS.dtype),
        CAPPED=logits.softcap != 0,
        KEEPS=keeps,
        BLOCK_M=launch.block_m,
        BLOCK_S=launch.block_s,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_E=max(16, triton.next_power_of_2(value_width)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **FUSED,
    )


def _attend_old(
    part: OldPart,
    number: int,
    query_BNQD: Tensor,
    beside: Pages,
    logits: Logits,
    partials: Partials,
    plan: Plan,
    keeps: bool,
) -> None:
    """Partial softmaxes over the slots of a part."""
    layout, (pages, key_channels, value_channels, table, counts, position, *_) = part
    rows, (batch, query_heads, queries, _) = len(counts), query_BNQD.shape
    words, halves = pages.view(torch.int16), pages.view(torch.float16)
    stored = pages.view(beside.key_PDS.dtype)
    first_split, first_column = sum(plan.old_splits[:number]), sum(plan.old_columns[:number])
    old_kernel[(rows, plan.old_splits[number], plan.blocks)](
        *(query_BNQD, words, halves, stored, key_channels, value_channels, table, counts),
        *(position if position.numel() else counts, *partials, *logits, *query_BNQD.stride()),
        *(first_split, plan.splits, plan.chunk, queries),
        *(first_column, plan.columns, table.shape[1]),
        HEADS=rows // batch,
        GROUP=batch * query_heads // rows,
        HOLES=bool(position.numel()),
        CAPPED=logits.softcap != 0,
        KEEPS=keeps,
        BLOCK_M=plan.launch.block_m,
        BLOCK_S=OLD_SLOTS,
        **_compiled_for(layout),
        **FUSED,
    )


def _compiled_for(layout: PageLayout) -> dict[str, Any]:
    """The constants of a layout. Places of codes and scales count numbers of two bytes."""
    key_scales, value_codes, value_scales, _ = layout.offsets
    quantised = min(layout.key_bits, layout.value_bits) < 16
    wide_codes = quantised and max(layout.key_kept, layout.value_kept) > 128
    return {
        "T": layout.key_kept,
        "U": layout.value_kept,
        "E": layout.value_width,
        "PAGE": layout.slots,
        "BYTES": layout.page_bytes,
        "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits,
        "KEY_GROUP": layout.key_group,
        "VALUE_GROUP": layout.value_group,
        "VALUE_GROUPS": layout.value_groups,
        "VALUE_BLOCKS": triton.cdiv(layout.value_kept, LINES),
        "KEY_SCALES": key_scales // 2,
        "VALUE_CODES": value_codes // 2,
        "VALUE_SCALES": value_scales // 2,
        "ITEM": layout.item_bytes,
        "BLOCK_T": max(16, triton.next_power_of_2(layout.key_kept)),
        "BLOCK_U": max(16, triton.next_power_of_2(layout.value_kept)),
        "num_warps": 8 if wide_codes else 4,
        "num_stages": 1,
    }
