"""The box of the keys of every page, the cells that keys are in, and how long numbers can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvpress.formulas.page_cells import cell_bytes
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Whole pages, as `unpack` takes them. bits: of the number of a cell; 0: there are none."""

    page_PX: Tensor
    channel_PC: Tensor
    channel_PU: Tensor
    layout: Sequence[int]
    like: Tensor
    bits: int


SCHEMA = schema("page_bounds", Operands, "(Tensor box_P2D, Tensor length_P2, Tensor cell_PY)")


def fake(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    sizes, like, pages = PageLayout(*operands.layout), operands.like, len(operands.page_PX)
    length_P2 = like.new_empty(pages, 2, dtype=like.float().dtype)
    width = cell_bytes(sizes.key_width, sizes.slots, operands.bits)
    cell_PY = operands.page_PX.new_empty(pages, width)
    return like.new_empty(pages, 2, sizes.key_width), length_P2, cell_PY
