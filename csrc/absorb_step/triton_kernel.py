"""Triton kernels of `absorb_step`: victims and matches row by row, then merges by sequence.

Nothing is read back: which slots go and where they are merged is found and done on the device.
"""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.absorb_step import Operands
from kvpress.csrc.absorb_step.reference import check
from kvpress.csrc.absorb_step.triton_device import find_kernel, merge_kernel
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

ELEMENTS = 4096  # of keys in a block of `find_kernel`


def absorb_step(operands: Operands) -> None:
    """The same as the reference, in two launches. Raises OperatorError."""
    check(operands)
    (key_PDS, _, table_RW, counts_R), rows = operands.pages, len(operands.pages.counts_R)
    if not table_RW.shape[1] or not len(key_PDS):
        return  # no row has a slot
    slot_2R = torch.empty(2, rows, dtype=torch.int32, device=key_PDS.device)
    similarity_R = torch.empty(rows, dtype=torch.float32, device=key_PDS.device)
    losses = (slot_2R, similarity_R, table_RW, counts_R)
    with device_of(key_PDS):
        _find(operands, losses)
        _merge(operands, losses)


def _find(operands: Operands, losses: tuple[Tensor, ...]) -> None:
    """Victims, the slots that are nearest to them, and their cosines."""
    pages, (position, mass), bounds = operands.pages, operands.columns, operands.bounds
    _, width, page = pages.key_PDS.shape
    rows, block_d = len(pages.counts_R), triton.next_power_of_2(width)
    find_kernel[(rows,)](
        *(pages.key_PDS, position, position if mass is None else mass, *losses, *bounds[:4]),
        pages.table_RW.shape[1],
        HEADS=rows // len(bounds.seen_B),
        D=width,
        WIDTH=operands.width,
        PAGE=page,
        RANK=RANKS.index(bounds.rank),
        KEEPS=mass is not None,
        SINKS=operands.merging.sinks,
        BLOCK_S=max(16, ELEMENTS // block_d),
        BLOCK_D=block_d,
        num_warps=4,
        **FUSED,
    )


def _merge(operands: Operands, losses: tuple[Tensor, ...]) -> None:
    """Thresholds of sequences, merges, and the last slots into the gaps."""
    pages, (position, mass), rule = operands.pages, operands.columns, operands.merging
    (frequency_F, interleaved, start), threshold_B = operands.turning, operands.threshold_B
    heads = len(pages.counts_R) // len(threshold_B)
    width, value_width = pages.key_PDS.shape[1], pages.value_PSE.shape[2]
    mass_or_any = position if mass is None else mass
    merge_kernel[(len(threshold_B),)](
        *(pages.key_PDS, pages.value_PSE, position, mass_or_any, *losses, threshold_B),
        *(threshold_B if frequency_F is None else frequency_F, pages.table_RW.shape[1]),
        *(start, rule.own, *rule.motion),
        HEADS=heads,
        D=width,
        WIDTH=operands.width,
        E=value_width,
        PAGE=pages.key_PDS.shape[2],
        PAIRS=0 if frequency_F is None else len(frequency_F),
        INTERLEAVED=interleaved,
        LARGEST=rule.largest,
        NORMALISED=rule.normalised,
        TOGETHER=rule.together,
        KEYS=rule.keys != "values_only",
        COUNTS=rule.counts,
        HAS_MASS=mass is not None,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_E=triton.next_power_of_2(value_width),
        num_warps=4,
        **FUSED,
    )
