"""Keys and values of whole pages of old slots, zeros where channels were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """What `pack` returned, and what it was given. like: a tensor of the dtype of the results."""

    page_PX: Tensor
    channel_PC: Tensor
    channel_PU: Tensor
    layout: Sequence[int]
    like: Tensor


SCHEMA = schema("unpack", Operands, "(Tensor key_PSD, Tensor value_PSE)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    sizes, like = PageLayout(*operands.layout), operands.like
    shape = (len(operands.page_PX), sizes.slots)
    return like.new_empty(*shape, sizes.key_width), like.new_empty(*shape, sizes.value_width)
