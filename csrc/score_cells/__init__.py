"""Tighter bounds of the products of queries with the keys of some pages, by the cells of keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Places, RowPages, schema


class Operands(NamedTuple):
    """Queries, boxes and cells of pages as `page_bounds` makes them, and which places are meant.

    bound_BNW: bounds of all places.
    """

    query_BND: Tensor
    box_P2D: Tensor
    cell_PY: Tensor  # uint8
    rows: RowPages
    places: Places
    bound_BNW: Tensor  # fp32
    bits: int
    slots: int  # of a page


SCHEMA = schema("score_cells", Operands, "(Tensor rank_BNW, Tensor bound_BNW)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    bound_BNW = operands.bound_BNW
    return bound_BNW.new_empty(bound_BNW.shape), bound_BNW.new_empty(bound_BNW.shape)
