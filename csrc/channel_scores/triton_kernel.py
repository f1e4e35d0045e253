"""Triton kernel of `channel_scores`: sums of squares over blocks of queries or slots."""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.channel_scores import Operands
from kvpress.csrc.channel_scores.reference import check
from kvpress.csrc.channel_scores.triton_device import squares_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

CHUNK, BLOCK = 1024, 32  # slots of a program, and of one step


def channel_scores(operands: Operands) -> Tensor:
    """Scores fp32 `[B, H, D]`, the same as the reference. Moves every key once.

    Raises OperatorError.
    """
    query_BNQD, key_BHSD, held_BHS = operands
    check(operands)
    batch, heads, _, width = key_BHSD.shape
    every = torch.ones(query_BNQD.shape[:3], dtype=torch.bool, device=query_BNQD.device)
    query_BND = _squares(query_BNQD, every)
    queries = query_BNQD.shape[1] // heads * query_BNQD.shape[2]
    energy_BHD = query_BND.view(batch, heads, -1, width).sum(2) / queries
    slots_BH1 = held_BHS.sum(-1, keepdim=True).clamp_min(1)
    return energy_BHD * (_squares(key_BHSD, held_BHS) / slots_BH1)


def _squares(x_BHSD: Tensor, held_BHS: Tensor) -> Tensor:
    """Sums of squares over the held slots: fp32 `[B, H, D]`."""
    batch, heads, slots, width = x_BHSD.shape
    splits = max(1, triton.cdiv(slots, CHUNK))
    part = torch.zeros(batch * heads, splits, width, dtype=torch.float32, device=x_BHSD.device)
    with device_of(x_BHSD):
        squares_kernel[(batch * heads, splits)](
            *(x_BHSD, held_BHS.contiguous(), part, *x_BHSD.stride(), slots, splits),
            HEADS=heads,
            WIDTH=width,
            CHUNK=CHUNK,
            BLOCK_S=BLOCK,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            num_warps=4,
            **FUSED,
        )
    return part.sum(1).view(batch, heads, width)
