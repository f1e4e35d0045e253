"""Which pages of each row are read: the always included ones, then those with the best bounds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Bounds of `score_pages`, which pages are a row's, and which of them must be read anyway.

    span_P2: int32, the first and the last position of every page. A page of which the first one is
    below `sink_R`, or the last one not below `from_R`, is always read. keep_R: pages to read, those
    included; never fewer than those. All of rows are int64.
    """

    bound_BNW: Tensor  # fp32
    table_RW: Tensor  # int32
    pages_R: Tensor
    span_P2: Tensor
    sink_R: Tensor
    from_R: Tensor
    keep_R: Tensor


SCHEMA = schema("choose_pages", Operands, "(Tensor place_RW, Tensor chosen_R)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    return operands.table_RW.new_empty(operands.table_RW.shape), operands.pages_R.clone()
