"""Whole pages of old slots: kept channels, quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Pages of numbers, the channels that each keeps (int16, ascending), and a PageLayout."""

    key_PSD: Tensor
    value_PSE: Tensor
    channel_PC: Tensor
    channel_PU: Tensor
    layout: Sequence[int]


SCHEMA = schema("pack", Operands, "Tensor page_PX")


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    shape = (len(operands.key_PSD), PageLayout(*operands.layout).page_bytes)
    return operands.key_PSD.new_empty(shape, dtype=torch.uint8)
