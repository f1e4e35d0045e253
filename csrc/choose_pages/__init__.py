"""Which pages of each row are read: the always included ones, then those with the best bounds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Always, RowPages, schema


class Operands(NamedTuple):
    """Bounds of `score_pages`, which pages are a row's, and which of them must be read anyway.

    keep_R: int64, pages to read, those included; never fewer than those.
    """

    bound_BNW: Tensor  # fp32
    rows: RowPages
    always: Always
    keep_R: Tensor


SCHEMA = schema("choose_pages", Operands, "(Tensor place_RW, Tensor chosen_R)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    table_RW, pages_R = operands.rows
    return table_RW.new_empty(table_RW.shape), pages_R.clone()
