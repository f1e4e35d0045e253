"""Triton kernels of `absorb_step`: victims and matches row by row, then merges by sequence.

Nothing is read back: which slots go and where they are merged is found and done on the device.
"""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.absorb_step.reference import check, check_choices, check_rule
from kvpress.csrc.absorb_step.triton_device import find_kernel, merge_kernel
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.ops.shapes import ages

ELEMENTS = 4096  # of keys in a block of `find_kernel`


def absorb_step(
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
    sink: int,
    rank: str,
    threshold_B: Tensor,
    frequency_F: Tensor | None,
    interleaved: bool,
    start: int,
    width: int,
    own: float,
    memory: float,
    gain: float,
    largest: bool,
    normalised: bool,
    together: bool,
    keys: bool,
    sinks: bool,
    counts: bool,
) -> None:
    """The same as the reference, in two launches. Raises OperatorError."""
    pools, books = (key_PDS, value_PSE, position_PS, mass_PS), (table_RW, counts_R)
    check(*pools, *books, seen_B, quota_R, recent_B, threshold_B, frequency_F)
    check_choices(key_PDS, mass_PS, frequency_F, rank, start, width, keys, counts)
    check_rule(own, memory, gain)
    ages("absorb_step", seen_B, recent_B, sink, 0)
    if not table_RW.shape[1] or not len(key_PDS):
        return  # no row has a slot
    batch, rows = len(seen_B), len(counts_R)
    stored, value_width = key_PDS.shape[1], value_PSE.shape[2]
    slot_2R = torch.empty(2, rows, dtype=torch.int32, device=key_PDS.device)
    similarity_R = torch.empty(rows, dtype=torch.float32, device=key_PDS.device)
    mass = position_PS if mass_PS is None else mass_PS
    losses = (slot_2R, similarity_R, table_RW, counts_R)
    block_d = triton.next_power_of_2(stored)
    with device_of(key_PDS):
        find_kernel[(rows,)](
            *(key_PDS, position_PS, mass, *losses, seen_B, quota_R, recent_B),
            *(sink, table_RW.shape[1]),
            HEADS=rows // batch,
            D=stored,
            WIDTH=width,
            PAGE=key_PDS.shape[2],
            RANK=RANKS.index(rank),
            KEEPS=mass_PS is not None,
            SINKS=sinks,
            BLOCK_S=max(16, ELEMENTS // block_d),
            BLOCK_D=block_d,
            num_warps=4,
            **FUSED,
        )
        merge_kernel[(batch,)](
            *(key_PDS, value_PSE, position_PS, mass, *losses, threshold_B),
            *(threshold_B if frequency_F is None else frequency_F, table_RW.shape[1]),
            *(start, own, memory, gain),
            HEADS=rows // batch,
            D=stored,
            WIDTH=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            PAIRS=0 if frequency_F is None else len(frequency_F),
            INTERLEAVED=interleaved,
            LARGEST=largest,
            NORMALISED=normalised,
            TOGETHER=together,
            KEYS=keys,
            COUNTS=counts,
            HAS_MASS=mass_PS is not None,
            BLOCK_H=triton.next_power_of_2(rows // batch),
            BLOCK_D=block_d,
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=4,
            **FUSED,
        )
