"""Triton kernel of `missed_mass`: a program for each row. The host waits for nothing."""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.missed_mass import Operands
from kvpress.csrc.missed_mass.reference import MOST, ROUNDED, check, slack
from kvpress.csrc.missed_mass.triton_device import missed_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

BLOCK = 1024  # pages that a program looks at together


def missed_mass(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference, with another order of sums. Raises OperatorError."""
    query_BND, bound_BNW, rows, places, length_P2, logits, slots = operands
    check(operands)
    (batch, heads, width), (count, columns) = query_BND.shape, rows.table_RW.shape
    missed_RW = rows.table_RW.new_empty(count, columns, dtype=torch.int8)
    mass_BN, longest_R = length_P2.new_empty(batch, heads), length_P2.new_empty(count)
    with device_of(query_BND):
        missed_kernel[(count,)](
            *(query_BND, bound_BNW, *rows, *places, length_P2, missed_RW),
            *(mass_BN, longest_R, columns, *slack(width, columns, slots), *logits),
            GROUP=batch * heads // count,
            D=width,
            CAPPED=logits.softcap != 0,
            ROUNDED=ROUNDED,
            MOST=MOST,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_W=min(BLOCK, max(16, triton.next_power_of_2(max(1, columns)))),
            num_warps=4,
            **FUSED,
        )
    return mass_BN, longest_R
