"""Triton kernel of `attend_blocks`: a program takes a block of queries of a head, or a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from kvpress.csrc.attend_blocks.reference import check
from kvpress.csrc.triton_common import (
    FUSED,
    by_architecture,
    device_of,
    dot,
    grow,
    weighted,
    wide,
)
from torch import Tensor

from kvpress.formulas.block_map import QUERIES, SLOTS, Blocks

SIZES = ["queries", "slots", "bytes_of_head"]
ROWS = tl.constexpr(QUERIES)


class Launch(NamedTuple):
    """Queries of a program, which share a row of the map, and its warps."""

    block_m: int
    num_warps: int


# Oldest architecture -> (most channels, bytes of a factor) -> parameters, without spills.
LAUNCH = {
    80: {
        (64, 2): Launch(64, 4),
        (128, 2): Launch(64, 4),
        (256, 2): Launch(64, 4),
        (64, 4): Launch(32, 4),
        (128, 4): Launch(16, 8),
        (256, 4): Launch(16, 4),
    },
}


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
    row = first // ROWS
    flat = tl.program_id(1).to(tl.int64)
    batch = flat // heads
    head = flat % heads
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    real = m < queries
    query_MD = tl.load(
        query + batch * query_batch + head * query_head + m[:, None] * query_token + d[None, :],
        mask=real[:, None] & (d[None, :] < WIDTH),
        other=0.0,
    )
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    out_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    begin = flat * bytes_of_head + tl.load(offset + row)
    for j in range(tl.load(end + row)):
        byte = tl.load(computed + begin + j // 8).to(tl.int32)
        if (byte >> (j % 8)) & 1 > 0:
            slot = j * BLOCK_S + s
            inside = slot < slots
            key_DS = tl.load(
                key + slot[None, :] * key_token + d[:, None],
                mask=inside[None, :] & (d[:, None] < WIDTH),
                other=0.0,
            )
            product_MS = dot(query_MD, key_DS, tl.zeros([BLOCK_M, BLOCK_S], tl.float32), WIDE)
            visible = slot[None, :] <= (slots - queries + m)[:, None]
            logits_MS = tl.where(visible, product_MS * scaling, float("-inf"))
            weight_MS, shrink_M, top_M, total_M = grow(logits_MS, top_M, total_M)
            if VALUE_WIDTH > 0:
                value_SE = tl.load(
                    value + slot[:, None] * value_token + e[None, :],
                    mask=inside[:, None] & (e[None, :] < VALUE_WIDTH),
                    other=0.0,
                )
                out_ME = weighted(weight_MS, value_SE, out_ME * shrink_M[:, None], WIDE_VALUE)
    own = flat * queries + m
    # Of an empty sum the logarithm would be -inf too, with a warning where this is interpreted.
    tl.store(lse + own, top_M + tl.log(tl.where(total_M == 0.0, 1.0, total_M)), mask=real)
    if VALUE_WIDTH > 0:
        out_ME = out_ME / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
        tl.store(
            out + own[:, None] * VALUE_WIDTH + e[None, :],
            out_ME.to(out.dtype.element_ty),
            mask=real[:, None] & (e[None, :] < VALUE_WIDTH),
        )


def attend_blocks(
    query_BNPD: Tensor, key_BHSD: Tensor, value_BHSE: Tensor, map_BNX: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same as the reference. Raises OperatorError."""
    check(query_BNPD, key_BHSD, value_BHSE, map_BNX, scaling)
    query, key, value = (
        x if x.stride(3) == 1 or x.shape[3] < 2 else x.contiguous()
        for x in (query_BNPD, key_BHSD, value_BHSE)
    )
    batch, heads, queries, width = query.shape
    slots, value_width, device = key.shape[2], value.shape[3], query.device
    blocks = Blocks(queries, slots)
    offsets = blocks.offsets
    offset, end, _ = blocks.tables(0, device)
    out_BNPE = query.new_empty(batch, heads, queries, value_width)
    lse_BNP = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    is_wide, wide_value = wide(query.dtype, key.dtype), wide(value.dtype)
    launch = by_architecture(LAUNCH, query, max(width, value_width), is_wide or wide_value)
    with device_of(query):
        attend_kernel[(triton.cdiv(queries, launch.block_m), batch * heads)](
            query, key, value, map_BNX, offset, end, out_BNPE, lse_BNP,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            queries, slots, offsets[-1], heads, heads // key.shape[1], scaling,
            WIDTH=width, VALUE_WIDTH=value_width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_E=max(16, triton.next_power_of_2(max(1, value_width))),
            BLOCK_M=launch.block_m, BLOCK_S=SLOTS, WIDE=is_wide, WIDE_VALUE=wide_value,
            num_warps=launch.num_warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return out_BNPE, lse_BNP
