"""Triton kernel of `score_pages`: a program for some pages of a row."""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.score_pages import Operands
from kvpress.csrc.score_pages.reference import check
from kvpress.csrc.score_pages.triton_device import score_kernel
from kvpress.csrc.triton_common import device_of
from torch import Tensor

BLOCK = 2048  # numbers of an end of boxes that a program holds


def score_pages(operands: Operands) -> Tensor:
    """The same as the reference, with another order of sums. Raises OperatorError."""
    query_BND, box_P2D, (table_RW, pages_R) = operands
    check(operands)
    (rows, places), width = table_RW.shape, query_BND.shape[2]
    shape = (*query_BND.shape[:2], places)
    bound_BNW = query_BND.new_empty(shape, dtype=torch.float32)
    if not places:
        return bound_BNW
    block_d = max(16, triton.next_power_of_2(width))
    block_w = max(16, BLOCK // block_d)
    with device_of(query_BND):
        score_kernel[(rows, triton.cdiv(places, block_w))](
            *(query_BND, box_P2D, table_RW, pages_R, bound_BNW, places),
            GROUP=query_BND.shape[0] * query_BND.shape[1] // rows,
            D=width,
            BLOCK_D=block_d,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,  # every page's products and sums are rounded alike
        )
    return bound_BNW
