"""PyTorch reference of `join_parts`."""

from __future__ import annotations

import math

import torch
from kvpress.csrc.join_parts import Operands
from torch import Tensor

from kvpress.ops import shapes

LEAST = -87.0  # of which the exponential is the smallest normal number


def join_parts(operands: Operands) -> tuple[Tensor, Tensor]:
    """The output and the LSE of all parts together, added in their order.

    A part whose LSE is −∞, or `LEAST` or more below the largest, adds nothing, whatever its output
    holds. Raises OperatorError.
    """
    out_JBNQE, lse_JBNQ = operands
    check(operands)
    joined_BNQE, total_BNQ = out_JBNQE.new_zeros(out_JBNQE.shape[1:]), lse_JBNQ.new_zeros(())
    top_BNQ = lse_JBNQ.new_full(lse_JBNQ.shape[1:], -torch.inf)
    for lse_BNQ in lse_JBNQ:
        top_BNQ = torch.maximum(top_BNQ, lse_BNQ)
    finite_BNQ = top_BNQ.masked_fill(top_BNQ == -torch.inf, 0)  # −∞ − −∞ is no number
    for out_BNQE, lse_BNQ in zip(out_JBNQE, lse_JBNQ, strict=True):
        below_BNQ = lse_BNQ - finite_BNQ
        weight_BNQ = below_BNQ.exp().masked_fill(below_BNQ <= LEAST, 0)
        total_BNQ = total_BNQ + weight_BNQ
        nothing_BNQ1 = (weight_BNQ == 0)[..., None]
        joined_BNQE += (weight_BNQ[..., None] * out_BNQE).masked_fill(nothing_BNQ1, 0)
    total_BNQ = total_BNQ.masked_fill(total_BNQ == 0, 1).expand(top_BNQ.shape)
    return joined_BNQE / total_BNQ[..., None], top_BNQ + total_BNQ.log()


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op, named = "join_parts", operands._asdict()
    lengths = shapes.bind(op, named)
    shapes.of_dtype(op, torch.float32, named)
    shapes.at_most(op, lengths, "E", shapes.MOST_WIDTH)
    if math.prod(max(1, lengths[letter]) for letter in "BNQE") * 8 >= 2**63:
        shapes.refuse(op, "the result would have more numbers than memory has bytes")
