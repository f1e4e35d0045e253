"""Causal attention over the blocks of a bit map."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """The P queries belong to the last P of S slots. Values of no channels give the LSE alone."""

    query_BNPD: Tensor
    key_BHSD: Tensor
    value_BHSE: Tensor
    map_BNX: Tensor
    scaling: float


SCHEMA = schema("attend_blocks", Operands, "(Tensor out_BNPE, Tensor lse_BNP)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    query_BNPD = operands.query_BNPD
    out_BNPE = query_BNPD.new_empty(*query_BNPD.shape[:3], operands.value_BHSE.shape[3])
    return out_BNPE, query_BNPD.new_empty(query_BNPD.shape[:3]).float()
