"""How much attention the pages that are not read can hold at most."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Logits, schema


class Operands(NamedTuple):
    """What `score_pages` and `choose_pages` took and gave; `length_P2` as of `page_bounds`.

    slots: of a page.
    """

    query_BND: Tensor
    bound_BNW: Tensor
    table_RW: Tensor
    pages_R: Tensor
    place_RW: Tensor  # int32
    chosen_R: Tensor
    length_P2: Tensor  # fp32
    logits: Logits
    slots: int


SCHEMA = schema("missed_mass", Operands, "(Tensor mass_BN, Tensor length_R)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    bound_BNW = operands.bound_BNW
    return bound_BNW.new_empty(bound_BNW.shape[:2]), bound_BNW.new_empty(len(operands.pages_R))
