"""Attention over several parts of the slots, from that over each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Outputs of J parts, and the logarithms of the sums of their exponentials: fp32."""

    out_JBNQE: Tensor
    lse_JBNQ: Tensor


SCHEMA = schema("join_parts", Operands, "(Tensor out_BNQE, Tensor lse_BNQ)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    out_JBNQE, lse_JBNQ = operands
    return out_JBNQE.new_empty(out_JBNQE.shape[1:]), lse_JBNQ.new_empty(lse_JBNQ.shape[1:])
