"""PyTorch reference of `page_bounds`."""

from __future__ import annotations

import torch
from kvpress.csrc.page_bounds import Operands
from kvpress.csrc.unpack.reference import check, numbers
from torch import Tensor

SLACK = 1 + 2.0**-14  # more than the rounding of a sum of 256 squares, and of its root


def page_bounds(operands: Operands) -> tuple[Tensor, Tensor]:
    """The least and the largest key of every channel `[P, 2, D]`, and lengths fp32 `[P, 2]`.

    The box is that of the numbers that kernels read, rounded outwards where its dtype does not
    have them; zero in dropped channels. The lengths are those of the corner of the box that is
    farthest from zero, and of the longest value, rounded up. Raises OperatorError.
    """
    sizes = check(operands, "page_bounds")
    page_PX, channel_PC, channel_PU, _, like = operands
    key_PSD, value_PSE = numbers(page_PX, channel_PC, channel_PU, sizes, like.dtype)
    if not len(page_PX):
        box_P2D = like.new_empty(0, 2, sizes.key_width)
        return box_P2D, box_P2D.new_empty(0, 2, dtype=torch.float32)
    low_PD, high_PD = key_PSD.amin(1), key_PSD.amax(1)
    box_P2D = torch.stack([-_up(-low_PD, like.dtype), _up(high_PD, like.dtype)], dim=1)
    corner_PD = box_P2D.float().abs().amax(1)
    length_P2 = torch.stack([corner_PD.norm(dim=-1), value_PSE.norm(dim=-1).amax(1)], dim=1)
    return box_P2D, length_P2 * SLACK


def _up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of a dtype that is not below x."""
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    above = torch.nextafter(near, near.new_full((), torch.inf))
    return torch.where(near.float() < x, above, near)
