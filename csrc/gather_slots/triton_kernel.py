"""Triton kernel of `gather_slots` and `scatter_slots`: copies of slots, bit by bit."""

from __future__ import annotations

import math

import torch
import triton
from kvpress.csrc.gather_slots import Operands, fake
from kvpress.csrc.gather_slots.reference import places
from kvpress.csrc.gather_slots.triton_device import copy_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

BLOCK = 2048  # numbers per program
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_slots(operands: Operands) -> Tensor:
    """The slots at `address_A` (page · page_slots + slot) of a pool: a fresh `[N, ...]`.

    The same as the reference; items of 1, 2, 4 or 8 bytes. Raises OperatorError.
    """
    pool_PX, address_A, slot_last = operands
    page_A, slot_A = places("gather_slots", pool_PX, address_A, slot_last)
    slots_AX = fake(operands)
    copy(pool_PX, page_A, slot_A, slots_AX, slot_last, into_pool=False)
    return slots_AX


def copy(
    pool_PX: Tensor,
    page_A: Tensor,
    slot_A: Tensor,
    slots_AX: Tensor,
    slot_last: bool,
    into_pool: bool,
) -> None:
    """Copies slots between a pool and a dense contiguous tensor, in either direction."""
    width = math.prod(slots_AX.shape[1:])
    page_slots = pool_PX.shape[-1] if slot_last else pool_PX.shape[1]
    if not slots_AX.numel():
        return
    integer = _INTEGERS[pool_PX.element_size()]
    block_x = min(128, triton.next_power_of_2(width))
    block_n = max(1, BLOCK // block_x)
    grid = (triton.cdiv(len(page_A), block_n), triton.cdiv(width, block_x))
    with device_of(pool_PX):
        copy_kernel[grid](
            *(pool_PX.view(integer), page_A, slot_A, slots_AX.view(integer), len(page_A)),
            WIDTH=width,
            PAGE=page_slots,
            SLOT_LAST=slot_last,
            INTO_POOL=into_pool,
            BLOCK_N=block_n,
            BLOCK_X=block_x,
            num_warps=4,
            **FUSED,
        )
