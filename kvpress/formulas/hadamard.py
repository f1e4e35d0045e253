"""Channels turned by an orthonormal Hadamard matrix: every one of them gets a share of each.

Few large channels then no longer stretch the step that quantised numbers share. The matrix of size
2ⁱ is Sylvester's, divided by its root: symmetric, and its own inverse. Other widths are turned in
blocks of the largest power of two that divides them: 96 = 3 · 32, 80 = 5 · 16.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvpress.host import lasting

LEAST = 16  # channels of a block: smaller ones spread nothing


def block(width: int) -> int:
    """Channels that are turned together: the largest power of two that divides the width."""
    return width & -width


def turned(column_XD: Tensor) -> Tensor:
    """The last dimension turned; turned twice it is what it was, up to rounding."""
    size = block(column_XD.shape[-1])
    matrix = _matrix(size, column_XD.dtype, column_XD.device)
    made: Tensor = column_XD.reshape(*column_XD.shape[:-1], -1, size) @ matrix
    return made.flatten(-2)


@cache
@lasting
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    unit: Tensor = (made / size**0.5).to(device=device, dtype=dtype)
    return unit
