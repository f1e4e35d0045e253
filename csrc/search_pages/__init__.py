"""Which pages of each row are read, found in a tree of boxes: the set that a scan of all gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Always, RowPages, schema


class Operands(NamedTuple):
    """As of `score_pages` and `choose_pages`, and the tree over the pages of each row.

    tree_RX2D: boxes of its inner nodes, of the dtype of `box_P2D`; see formulas/page_tree.py.
    state_RX: int8, of the same nodes. −1: collapsed, or below such a node; otherwise expanded, and
    for how many steps in a row neither of its children was expanded or chosen.
    """

    query_BND: Tensor
    box_P2D: Tensor
    rows: RowPages
    tree_RX2D: Tensor
    state_RX: Tensor
    always: Always
    keep_R: Tensor


WRITES = ("state_RX",)
SCHEMA = schema(
    "search_pages",
    Operands,
    "(Tensor place_RW, Tensor chosen_R, Tensor bound_BNW, Tensor boxes_R)",
    writes=WRITES,
)


def fake(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    query_BND, (table_RW, pages_R) = operands.query_BND, operands.rows
    shape = (*query_BND.shape[:2], table_RW.shape[1])
    bound_BNW = query_BND.new_empty(shape, dtype=query_BND.float().dtype)
    return table_RW.new_empty(table_RW.shape), pages_R.clone(), bound_BNW, pages_R.clone()
