"""Triton kernel of `channel_scores`: sums of squares over blocks of queries or slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kvpress.csrc.channel_scores.reference import check
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

CHUNK, BLOCK = 1024, 32  # slots of a program, and of one step


def channel_scores(query_BNWD: Tensor, key_BHSD: Tensor, held_BHS: Tensor) -> Tensor:
    """Scores fp32 `[B, H, D]`, the same as the reference. Moves every key once.

    Raises OperatorError.
    """
    check(query_BNWD, key_BHSD, held_BHS)
    batch, heads, _, width = key_BHSD.shape
    every = torch.ones(query_BNWD.shape[:3], dtype=torch.bool, device=query_BNWD.device)
    query_BND = _squares(query_BNWD, every)
    queries = query_BNWD.shape[1] // heads * query_BNWD.shape[2]
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


@triton.jit(do_not_specialize=["slots", "splits"])
def squares_kernel(
    x,
    held,
    part,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    slots,
    splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of squares of one chunk of a row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    base = x + row // HEADS * stride_b + row % HEADS * stride_h
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, slots), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        held_S = tl.load(held + row * slots + s_S, mask=s_S < slots, other=0) != 0
        from_SD = s_S.to(tl.int64)[:, None] * stride_s + d_D[None, :] * stride_d
        mask_SD = held_S[:, None] & (d_D < WIDTH)[None, :]
        x_SD = tl.load(base + from_SD, mask=mask_SD, other=0).to(tl.float32)
        sum_D += tl.sum(x_SD * x_SD, 0)
    tl.store(part + (row * splits + split) * WIDTH + d_D, sum_D, mask=d_D < WIDTH)
