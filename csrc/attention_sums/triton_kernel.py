"""Triton kernels of `attention_sums`: one pass for the normalisers, one for the columns.

Both compute the logits anew, so that no Q×S matrix exists. Every column is of one program, which
goes over its queries in a fixed order: the result is the same in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from kvpress.csrc.attention_sums import Operands
from kvpress.csrc.attention_sums.reference import check
from kvpress.csrc.attention_sums.triton_device import lse_kernel, sums_kernel
from kvpress.csrc.triton_common import FUSED, NOISES, by_architecture, device_of, noise_stream, wide
from torch import Tensor

from kvpress.formulas.block_map import Blocks

PROGRAMS = 1024  # enough to fill a device: few queries are split along the keys


class Launch(NamedTuple):
    """Launch parameters of both kernels."""

    block_m: int  # queries
    block_s: int  # slots
    num_warps: int
    num_stages: int


# Oldest architecture -> (most channels, bytes of a factor) -> parameters.
LAUNCH = {
    80: {
        (64, 2): Launch(64, 64, 4, 2),
        (128, 2): Launch(64, 64, 8, 2),
        (256, 2): Launch(64, 32, 4, 2),
        (64, 4): Launch(32, 32, 8, 2),
        (128, 4): Launch(32, 32, 8, 2),
        (256, 4): Launch(16, 16, 4, 1),
    },
}


def attention_sums(operands: Operands) -> Tensor:
    """Attention that each slot receives from the last `window` queries: fp32 `[B, N, S]`.

    The same as the reference. Moves keys once per block of queries and queries once per block of
    keys, and holds 4 bytes per query and part of the keys. Raises OperatorError.
    """
    check(operands)
    query_BNQD, key_BHSD = operands[:2]
    (batch, query_heads, queries, width), slots = query_BNQD.shape, key_BHSD.shape[2]
    window, largest, weight_BQ = operands.reduction
    summed = min(window, queries)
    shape = (batch, query_heads, slots)
    sums_BNS = torch.zeros(shape, dtype=torch.float32, device=query_BNQD.device)
    if not summed or not sums_BNS.numel():
        return sums_BNS
    launch = by_architecture(LAUNCH, query_BNQD, width, wide(query_BNQD.dtype, key_BHSD.dtype))
    blocks, key_blocks = triton.cdiv(summed, launch.block_m), triton.cdiv(slots, launch.block_s)
    splits = min(key_blocks, max(1, PROGRAMS // (blocks * batch * query_heads)))
    chunk = triton.cdiv(key_blocks, splits) * launch.block_s
    lse = sums_BNS.new_empty(splits, batch, query_heads, summed)
    tensors, numbers, options = operands[:3], _numbers(operands), _options(operands, launch)
    sizes = (queries, slots, summed)
    with device_of(query_BNQD):
        lse_kernel[(blocks, batch * query_heads, splits)](
            *tensors, lse, *numbers, *sizes, chunk, **options
        )
        lse_BNQ = lse.logsumexp(0) if splits > 1 else lse
        sums_kernel[(key_blocks, batch * query_heads)](
            *(*tensors, lse_BNQ, sums_BNS, lse_BNQ if weight_BQ is None else weight_BQ),
            *numbers,
            *sizes,
            LARGEST=largest,
            WEIGHTED=weight_BQ is not None,
            **options,
        )
    return sums_BNS


def _numbers(operands: Operands) -> tuple[Any, ...]:
    """What both kernels take besides their tensors: the map, how logits are made, strides."""
    query_BNQD, key_BHSD, position_BHS, logits, _, noise, map_BNX = operands
    blocks = Blocks(query_BNQD.shape[2], key_BHSD.shape[2])
    offset_I = torch.tensor(blocks.offsets, dtype=torch.int32, device=query_BNQD.device)
    chosen = (position_BHS if map_BNX is None else map_BNX, offset_I)  # not read without a map
    stream = noise_stream(noise.seed, noise.layer, noise.first)
    strides = (*query_BNQD.stride(), *key_BHSD.stride(), *position_BHS.stride())
    return (*chosen, blocks.offsets[-1], *logits, 1.0 / noise.tau, stream, *strides)


def _options(operands: Operands, launch: Launch) -> dict[str, Any]:
    """What both kernels are compiled for."""
    query_BNQD, key_BHSD = operands[:2]
    width, heads = query_BNQD.shape[3], key_BHSD.shape[1]
    return {
        "HEADS": heads,
        "GROUP": query_BNQD.shape[1] // heads,
        "D": width,
        "WIDE": wide(query_BNQD.dtype, key_BHSD.dtype),
        "CAPPED": operands.logits.softcap != 0,
        "NOISE": NOISES[operands.noise.noise],
        "MAPPED": operands.map_BNX is not None,
        "BLOCK_M": launch.block_m,
        "BLOCK_S": launch.block_s,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **FUSED,
    }
