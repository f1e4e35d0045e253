"""Causal attention over the blocks of a bit map."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """The Q queries belong to the last Q of S slots. Values of no channels give the LSE alone."""

    query_BNQD: Tensor
    key_BHSD: Tensor
    value_BHSE: Tensor
    map_BNX: Tensor
    scaling: float


SCHEMA = schema("attend_blocks", Operands, "(Tensor out_BNQE, Tensor lse_BNQ)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    query_BNQD = operands.query_BNQD
    out_BNQE = query_BNQD.new_empty(*query_BNQD.shape[:3], operands.value_BHSE.shape[3])
    return out_BNQE, query_BNQD.new_empty(query_BNQD.shape[:3]).float()
