"""Whole pages of old slots: kept channels, quantised."""

from __future__ import annotations

from torch import Tensor

from kvpress.formulas.page_layout import PageLayout

SCHEMA = (
    "pack(Tensor key_PSD, Tensor value_PSE, Tensor channel_PT, Tensor channel_PU, int[] layout)"
    " -> Tensor page_PX"
)


def fake(
    key_PSD: Tensor, value_PSE: Tensor, channel_PT: Tensor, channel_PU: Tensor, layout: list[int]
) -> Tensor:
    """An empty result of the right shape and dtype."""
    size = PageLayout(*layout).page_bytes
    return key_PSD.new_empty((len(key_PSD), size), dtype=channel_PT.new_empty(0).byte().dtype)
