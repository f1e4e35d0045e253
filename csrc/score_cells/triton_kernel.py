"""Triton kernel of `score_cells`: a program for each named page of a row."""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.score_cells import Operands
from kvpress.csrc.score_cells.reference import LEAST, SMALL, check, slack
from kvpress.csrc.score_cells.triton_device import cells_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

BLOCK = 4096  # cells that a program holds at once


def score_cells(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference, with another order of sums. Raises OperatorError."""
    query_BND, box_P2D, cell_PY, rows, named, bound_BNW = operands[:6]
    check(operands)
    (count, places), width = rows.table_RW.shape, query_BND.shape[2]
    rank_BNW, made_BNW = torch.full_like(bound_BNW, -torch.inf), bound_BNW.clone()
    if not places:
        return rank_BNW, made_BNW
    block_d = max(16, triton.next_power_of_2(width))
    block_s = max(16, min(triton.next_power_of_2(operands.slots), BLOCK // block_d))
    with device_of(query_BND):
        cells_kernel[(count, places)](
            *(query_BND, box_P2D, cell_PY, *rows, *named, rank_BNW, made_BNW, places),
            GROUP=query_BND.shape[0] * query_BND.shape[1] // count,
            D=width,
            BITS=operands.bits,
            SLOTS=operands.slots,
            BYTES=cell_PY.shape[1],
            LEAST=LEAST,
            SLACK=slack(width),
            SMALL=width * SMALL,
            BLOCK_D=block_d,
            BLOCK_S=block_s,
            num_warps=4,
            **FUSED,
        )
    return rank_BNW, made_BNW
