"""PyTorch reference of `page_bounds`."""

from __future__ import annotations

import torch
from kvpress.csrc.page_bounds import Operands
from kvpress.csrc.unpack import Operands as Packed
from kvpress.csrc.unpack.reference import check as check_packed
from kvpress.csrc.unpack.reference import numbers
from torch import Tensor

from kvpress.formulas import page_cells
from kvpress.formulas.page_cells import cell_bytes, to_cells
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import shapes

SLACK = 1 + 2.0**-14  # more than the rounding of a sum of 256 squares, and of its root


def page_bounds(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Least and largest key of every channel `[P, 2, D]`, lengths fp32 `[P, 2]`, cells `[P, Y]`.

    The box is that of the numbers that kernels read, rounded outwards where its dtype does not
    have them; zero in dropped channels. The lengths are those of the corner of the box that is
    farthest from zero, and of the longest value, rounded up. A cell is one of 2^bits equal parts of
    the box, in every channel by itself. Raises OperatorError.
    """
    sizes = check(operands)
    page_PX, channel_PC, channel_PU, _, like, bits = operands
    width = cell_bytes(sizes.key_width, sizes.slots, bits)
    if not len(page_PX):
        box_P2D = like.new_empty(0, 2, sizes.key_width)
        return box_P2D, like.new_empty(0, 2, dtype=torch.float32), page_PX.new_empty(0, width)
    key_PSD, value_PSE = numbers(page_PX, channel_PC, channel_PU, sizes, like.dtype)
    low_PD, high_PD = key_PSD.amin(1), key_PSD.amax(1)
    box_P2D = torch.stack([-_up(-low_PD, like.dtype), _up(high_PD, like.dtype)], dim=1)
    corner_PD = box_P2D.float().abs().amax(1)
    length_P2 = torch.stack([corner_PD.norm(dim=-1), value_PSE.norm(dim=-1).amax(1)], dim=1)
    cell_PY = page_PX.new_empty(len(page_PX), 0)
    if bits:
        cell_PY = to_cells(cells(key_PSD, box_P2D, bits), bits)
    return box_P2D, length_P2 * SLACK, cell_PY


def cells(key_PSD: Tensor, box_P2D: Tensor, bits: int) -> Tensor:
    """The numbers of the cells of keys, from below: uint8. 0 where a box has no extent, or none."""
    low_P1D, high_P1D = (end_PD[:, None] for end_PD in box_P2D.float().unbind(1))
    extent_P1D = high_P1D - low_P1D
    # Not a number over a tensor, which is a product with the reciprocal: that may be subnormal.
    per_P1D = torch.full_like(extent_P1D, 2.0**bits) / extent_P1D
    per_P1D = per_P1D.masked_fill(~per_P1D.isfinite(), 0)
    code_PSD = ((key_PSD - low_P1D) * per_P1D).nan_to_num(0.0)
    return code_PSD.clamp(0, 2**bits - 1).to(torch.uint8)


def _up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of a dtype that is not below x."""
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    above = torch.nextafter(near, near.new_full((), torch.inf))
    return torch.where(near.float() < x, above, near)


def check(operands: Operands) -> PageLayout:
    """The layout. Raises OperatorError for tensors that do not fit it."""
    op = "page_bounds"
    sizes = check_packed(Packed(*operands[:5]), op)
    if sizes.boosted:
        shapes.refuse(op, f"{sizes}: a channel with two codes has no bounds")
    if operands.bits and operands.bits not in page_cells.BITS:
        shapes.refuse(op, f"bits is {operands.bits}; 0 and {page_cells.BITS} are allowed")
    if operands.bits and sizes.slots % page_cells.PAGE:
        shapes.refuse(op, f"pages have {sizes.slots} slots, with cells 32·n")
    return sizes
