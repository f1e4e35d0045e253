"""Triton kernel of `attend_blocks`: a program takes a block of queries of a head, or a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from kvpress.csrc.attend_blocks import Operands
from kvpress.csrc.attend_blocks.reference import check
from kvpress.csrc.attend_blocks.triton_device import attend_kernel
from kvpress.csrc.triton_common import FUSED, by_architecture, device_of, wide
from torch import Tensor

from kvpress.formulas.block_map import SLOTS, Blocks


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


def attend_blocks(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference. Raises OperatorError."""
    query_BNQD, key_BHSD, value_BHSE, map_BNX, scaling = operands
    check(operands)
    query, key, value = (
        x if x.stride(3) == 1 or x.shape[3] < 2 else x.contiguous()
        for x in (query_BNQD, key_BHSD, value_BHSE)
    )
    batch, heads, queries, width = query.shape
    slots, value_width, device = key.shape[2], value.shape[3], query.device
    blocks = Blocks(queries, slots)
    offsets = blocks.offsets
    offset, end, _ = blocks.tables(0, device)
    out_BNQE = query.new_empty(batch, heads, queries, value_width)
    lse_BNQ = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    is_wide, wide_value = wide(query.dtype, key.dtype), wide(value.dtype)
    launch = by_architecture(LAUNCH, query, max(width, value_width), is_wide or wide_value)
    with device_of(query):
        attend_kernel[(triton.cdiv(queries, launch.block_m), batch * heads)](
            query, key, value, map_BNX, offset, end, out_BNQE, lse_BNQ,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            queries, slots, offsets[-1], heads, heads // key.shape[1], scaling,
            WIDTH=width, VALUE_WIDTH=value_width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_E=max(16, triton.next_power_of_2(max(1, value_width))),
            BLOCK_M=launch.block_m, BLOCK_S=SLOTS, WIDE=is_wide, WIDE_VALUE=wide_value,
            num_warps=launch.num_warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return out_BNQE, lse_BNQ
