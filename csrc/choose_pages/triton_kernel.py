"""Triton kernel of `choose_pages`: a program for each row. The host waits for nothing."""

from __future__ import annotations

import triton
from kvpress.csrc.choose_pages import Operands
from kvpress.csrc.choose_pages.reference import check
from kvpress.csrc.choose_pages.triton_device import choose_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor


def choose_pages(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference, whatever the order of sums of bounds was. Raises OperatorError."""
    bound_BNW, (table_RW, pages_R), always, keep_R = operands
    check(operands)
    rows, places = table_RW.shape
    place_RW, chosen_R = table_RW.new_empty(rows, places), pages_R.new_zeros(rows)
    if not places:
        return place_RW, chosen_R
    block = max(16, triton.next_power_of_2(places))
    with device_of(bound_BNW):
        choose_kernel[(rows,)](
            *(bound_BNW, table_RW, pages_R, *always, keep_R, place_RW, chosen_R, places),
            GROUP=bound_BNW.shape[0] * bound_BNW.shape[1] // rows,
            BLOCK_W=block,
            num_warps=min(16, max(1, block // 512)),
            **FUSED,
        )
    return place_RW, chosen_R
