"""The box of the keys of every page, and how long its keys and values can be."""

from __future__ import annotations

from kvpress.csrc.unpack import Operands as Operands  # whole pages, as `unpack` takes them
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops.operands import schema

SCHEMA = schema("page_bounds", Operands, "(Tensor box_P2D, Tensor length_P2)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    sizes, like, pages = PageLayout(*operands.layout), operands.like, len(operands.page_PX)
    length_P2 = like.new_empty(pages, 2, dtype=like.float().dtype)
    return like.new_empty(pages, 2, sizes.key_width), length_P2
