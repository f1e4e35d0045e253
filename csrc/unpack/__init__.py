"""Keys and values of whole pages of old slots, zeros where channels were dropped."""

from __future__ import annotations

from torch import Tensor

from kvpress.formulas.page_layout import PageLayout

SCHEMA = (
    "unpack(Tensor page_PX, Tensor channel_PT, Tensor channel_PU, int[] layout, Tensor like)"
    " -> (Tensor key_PSD, Tensor value_PSE)"
)


def fake(
    page_PX: Tensor, channel_PT: Tensor, channel_PU: Tensor, layout: list[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    sizes = PageLayout(*layout)
    shape = (len(page_PX), sizes.slots)
    return like.new_empty(*shape, sizes.key_width), like.new_empty(*shape, sizes.value_width)
