"""A decode step that reads the recent slots, and those old pages that bounds choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvpress.formulas.page_layout import parts_of
from kvpress.ops.operands import Choice, Logits, Old, Pages, schema

BESIDE = 4  # tensors of each part of old slots by which its pages are judged


class Operands(NamedTuple):
    """The newest slot of a row is the query's own; `old` has all old pages, to be chosen from.

    judged: of each part its box_P2D, length_P2 and cell_PY as `page_bounds` makes them, and span_P2
    as `choose_pages` takes it. seen_B: tokens of each sequence, int64. slots: tokens of each row
    that are read, at the most, pages that must be read apart.
    """

    query_BN1D: Tensor
    pages: Pages
    logits: Logits
    old: Old
    judged: Sequence[Tensor]
    seen_B: Tensor
    slots: Sequence[int]
    choice: Choice


RESULTS = (
    "(Tensor out_BN1E, Tensor lse_BN, Tensor mass_BN, Tensor length_R, Tensor place_RW,"
    " Tensor chosen_XR, Tensor judged_XR)"
)
SCHEMA = schema("decode_chosen", Operands, RESULTS)


def fake(operands: Operands) -> tuple[Tensor, ...]:
    """Empty results of the right shape and dtype."""
    query_BN1D, (_, value_PSE, table_RW, counts_R) = operands[:2]
    parts = parts_of("decode_chosen", list(operands.old.tensors), list(operands.old.layouts))
    shape, rows = query_BN1D.shape[:2], len(counts_R)
    lse_BN = query_BN1D.new_empty(shape, dtype=query_BN1D.float().dtype)
    chosen_XR = counts_R.new_empty(len(parts), rows)
    return (
        query_BN1D.new_empty(*shape, 1, value_PSE.shape[2]),
        lse_BN,
        lse_BN.new_empty(shape),
        lse_BN.new_empty(rows),
        table_RW.new_empty(rows, sum(tensors[3].shape[1] for _, tensors in parts)),
        chosen_XR,
        chosen_XR.new_empty(chosen_XR.shape),
    )
