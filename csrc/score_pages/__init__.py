"""Upper bounds of the products of queries with the keys of each page."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import RowPages, schema


class Operands(NamedTuple):
    """One query of every head, the boxes of all pages, and which pages are a row's."""

    query_BND: Tensor
    box_P2D: Tensor
    rows: RowPages


SCHEMA = schema("score_pages", Operands, "Tensor")


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    query_BND, _, rows = operands
    shape = (*query_BND.shape[:2], rows.table_RW.shape[1])
    return query_BND.new_empty(shape, dtype=query_BND.float().dtype)
