"""How the cells of a page's keys lie in memory: a few bits for every channel of every slot.

A unit is 32 bytes: 8 neighbouring slots, each of 4 neighbouring channels side by side, as
instructions multiply bytes and add them in fours. A byte has 8 / bits fields: the same channel of
the slots 8, 16, … further on. So a unit holds 8 · 8 / bits slots; units of the same slots follow
each other by their channels, those of the next slots follow them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 4)  # of the number of a cell
SLOTS, CHANNELS = 8, 4  # side by side in a unit
PAGE = 32  # slots of a page are a multiple of this, so that units are full


def cell_bytes(width: int, slots: int, bits: int) -> int:
    """Bytes of the cells of a page. 0 bits: there are none."""
    return -(-width // CHANNELS) * CHANNELS * slots * bits // 8


def to_cells(code_PSD: Tensor, bits: int) -> Tensor:
    """The bytes of the numbers of cells (uint8): `[P, bytes]`."""
    pages, _, width = code_PSD.shape
    code_PSD = torch.nn.functional.pad(code_PSD, (0, -width % CHANNELS))
    fields = 8 // bits
    code = code_PSD.reshape(pages, -1, fields, SLOTS, code_PSD.shape[2] // CHANNELS, CHANNELS)
    code = code.permute(0, 1, 4, 3, 5, 2)  # fields last, behind the bytes of units
    shift_f = torch.arange(fields, device=code.device, dtype=torch.int32) * bits
    return (code.int() << shift_f).sum(-1).flatten(1).to(torch.uint8)


def from_cells(cell_PY: Tensor, width: int, slots: int, bits: int) -> Tensor:
    """The numbers that `to_cells` made bytes: uint8 `[P, S, D]`."""
    pages, fields, quads = len(cell_PY), 8 // bits, -(-width // CHANNELS)
    shift_f = torch.arange(fields, device=cell_PY.device, dtype=torch.int32) * bits
    unit = cell_PY.int().view(pages, slots // (SLOTS * fields), quads, SLOTS, CHANNELS)
    code = (unit[..., None] >> shift_f & (2**bits - 1)).permute(0, 1, 5, 3, 2, 4)
    code_PSD: Tensor = code.reshape(pages, slots, quads * CHANNELS)[..., :width].to(torch.uint8)
    return code_PSD
