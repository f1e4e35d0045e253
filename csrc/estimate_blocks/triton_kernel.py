"""Triton kernel of `estimate_blocks`: one program per block of queries of a head.

4-bit codes are multiplied as int8 with int32 sums, which every architecture has; on those with
4-bit products, and with nvcc, cuda_kernel.py takes over. All that decides is done in the same order
as in the reference, so that maps are equal to the bit.
"""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.estimate_blocks import Operands, cuda_kernel
from kvpress.csrc.estimate_blocks.reference import HIGH, check
from kvpress.csrc.estimate_blocks.triton_device import block_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.formulas.block_map import MOST_CODE, QUERIES, SLOTS, Blocks


def estimate_blocks(operands: Operands) -> Tensor:
    """The same as the reference, to the bit. Raises OperatorError."""
    check(operands)
    *tensors, local = operands
    query_BNQD, key_BHSD = operands.query_BNQD, operands.key_BHSD
    if cuda_kernel.available(query_BNQD):
        return cuda_kernel.estimate_blocks(operands)
    batch, heads, queries, width = query_BNQD.shape
    slots, device = key_BHSD.shape[2], query_BNQD.device
    blocks = Blocks(queries, slots)
    offsets = blocks.offsets
    map_BNX = torch.empty(batch, heads, offsets[-1], dtype=torch.uint8, device=device)
    offset, end, first_local = blocks.tables(local, device)
    with device_of(query_BNQD):
        block_kernel[(blocks.rows, batch * heads)](
            *tensors,
            offset, end, first_local, map_BNX, queries, slots, blocks.columns, offsets[-1],
            float(HIGH - MOST_CODE**2 * width - 1), heads // key_BHSD.shape[1],
            WIDTH=width, BLOCK_D=max(32, triton.next_power_of_2(width)), BLOCK_M=QUERIES,
            BLOCK_S=SLOTS, num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
    return map_BNX
