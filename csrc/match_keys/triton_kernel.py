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
    evicted_BHED, kept_BHCD, allowed_BHC = operands
    check(operands)
    batch, heads, keys, width = evicted_BHED.shape
    similarity_BHE, target_BHE = fake(operands)
    if not target_BHE.numel():
        return similarity_BHE, target_BHE
    is_wide = wide(evicted_BHED.dtype)
    launch = by_architecture(LAUNCH, evicted_BHED, width, is_wide)
    allowed_BHC = allowed_BHC.view(torch.int8)
    strides = (*evicted_BHED.stride(), *kept_BHCD.stride(), *allowed_BHC.stride())
    with device_of(evicted_BHED):
        match_kernel[(triton.cdiv(keys, launch.block_e), batch * heads)](
            *(evicted_BHED, kept_BHCD, allowed_BHC, similarity_BHE, target_BHE),
            *(*strides, keys, kept_BHCD.shape[2]),
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
    return similarity_BHE, target_BHE
