"""PyTorch reference of `channel_scores`."""

from __future__ import annotations

import torch
from kvpress.csrc.channel_scores import Operands
from torch import Tensor

from kvpress.ops import shapes


def channel_scores(operands: Operands) -> Tensor:
    """Scores fp32 `[B, H, D]`: mean q² over group and window, times mean k² over held slots.

    held_BHS: bool; a row without a slot scores 0. Everything in fp32. Raises OperatorError.
    """
    query_BNQD, key_BHSD, held_BHS = operands
    check(operands)
    batch, heads, _, width = key_BHSD.shape
    query_BHXD = query_BNQD.float().reshape(batch, heads, -1, width)
    key_BHSD = key_BHSD.float().masked_fill(~held_BHS[..., None], 0)
    slots_BH1 = held_BHS.sum(-1, keepdim=True).clamp_min(1)
    return query_BHXD.square().mean(2) * (key_BHSD.square().sum(2) / slots_BH1)


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op = "channel_scores"
    query_BNQD, key_BHSD, held_BHS = operands
    floats = {"query_BNQD": query_BNQD, "key_BHSD": key_BHSD}
    lengths = shapes.bind(op, {**floats, "held_BHS": held_BHS})
    shapes.floating(op, floats)
    if held_BHS.dtype != torch.bool:
        shapes.refuse(op, f"held_BHS is {held_BHS.dtype}; it must be bool")
    shapes.heads(op, lengths, "BHNQD")
