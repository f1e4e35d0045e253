"""How much attention the pages that are not read can hold at most."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Logits, Places, RowPages, schema


class Operands(NamedTuple):
    """What `score_pages` and `choose_pages` took and gave; `length_P2` as of `page_bounds`.

    slots: of a page.
    """

    query_BND: Tensor
    bound_BNW: Tensor
    rows: RowPages
    places: Places
    length_P2: Tensor  # fp32
    logits: Logits
    slots: int


SCHEMA = schema("missed_mass", Operands, "(Tensor mass_BN, Tensor length_R)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    bound_BNW = operands.bound_BNW
    return bound_BNW.new_empty(bound_BNW.shape[:2]), bound_BNW.new_empty(len(operands.rows.pages_R))
