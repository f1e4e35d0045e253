"""Triton kernel of `match_keys`: a block of evicted keys against all kept keys of its row.

Products are of the keys as they are, so that tensor cores multiply half-precision keys exactly; the
norms are divided out afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from kvpress.csrc.match_keys import Operands, fake
from kvpress.csrc.match_keys.reference import check
from kvpress.csrc.match_keys.triton_device import match_kernel
from kvpress.csrc.triton_common import FUSED, by_architecture, device_of, wide
from torch import Tensor


class Launch(NamedTuple):
    """Launch parameters."""

    block_e: int  # evicted keys
    block_c: int  # kept keys
    num_warps: int
    num_stages: int


# Oldest architecture -> (most channels, bytes of a factor) -> parameters.
LAUNCH = {
    80: {
        (64, 2): Launch(64, 64, 4, 2),
        (128, 2): Launch(64, 64, 4, 2),
        (256, 2): Launch(64, 64, 8, 2),
        (64, 4): Launch(32, 32, 4, 2),
        (128, 4): Launch(32, 32, 8, 2),
        (256, 4): Launch(16, 16, 4, 1),
    },
}


def match_keys(operands: Operands) -> tuple[Tensor, Tensor]:
    """The largest cosine of each evicted key with an allowed kept key, and that key's index.

    The same as the reference. Moves the evicted keys once and the kept keys once per block of them.
    Raises OperatorError.
    """
    evicted_BHVD, kept_BHKD, allowed_BHK = operands
    check(operands)
    batch, heads, keys, width = evicted_BHVD.shape
    similarity_BHV, target_BHV = fake(operands)
    if not target_BHV.numel():
        return similarity_BHV, target_BHV
    is_wide = wide(evicted_BHVD.dtype)
    launch = by_architecture(LAUNCH, evicted_BHVD, width, is_wide)
    allowed_BHK = allowed_BHK.view(torch.int8)
    strides = (*evicted_BHVD.stride(), *kept_BHKD.stride(), *allowed_BHK.stride())
    with device_of(evicted_BHVD):
        match_kernel[(triton.cdiv(keys, launch.block_e), batch * heads)](
            *(evicted_BHVD, kept_BHKD, allowed_BHK, similarity_BHV, target_BHV),
            *(*strides, keys, kept_BHKD.shape[2]),
            HEADS=heads,
            D=width,
            WIDE=is_wide,
            BLOCK_E=launch.block_e,
            BLOCK_C=launch.block_c,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **FUSED,
        )
    return similarity_BHV, target_BHV
