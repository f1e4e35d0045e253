"""Triton kernel of `join_parts`: a program for each query of a head."""

from __future__ import annotations

import triton
from kvpress.csrc.join_parts import Operands, fake
from kvpress.csrc.join_parts.reference import LEAST, check
from kvpress.csrc.join_parts.triton_device import join_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

BLOCK = 16  # parts of a step


def join_parts(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference; 16 parts are summed at a time. Raises OperatorError."""
    out_JBNQE, lse_JBNQ = operands
    check(operands)
    out_BNQE, lse_BNQ = fake(operands)
    items, width = lse_BNQ.numel(), out_BNQE.shape[-1]
    if not items:
        return out_BNQE, lse_BNQ
    with device_of(out_JBNQE):
        join_kernel[(items,)](
            *(out_JBNQE, lse_JBNQ, out_BNQE, lse_BNQ, len(out_JBNQE), items),
            E=width,
            BLOCK_E=max(16, triton.next_power_of_2(max(1, width))),
            BLOCK_J=BLOCK,
            LEAST=LEAST,
            num_warps=4,
            **FUSED,
        )
    return out_BNQE, lse_BNQ
