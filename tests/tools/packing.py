"""Parts of old slots for tests of the operators: random pages, ragged rows, holes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops.registry import implementation
from kvpress.store import packing


def layout_of(
    key_bits: int,
    value_bits: int,
    widths: tuple[int, int],
    kept: tuple[int, int],
    dtype: torch.dtype,
    slots: int = 64,
    groups: tuple[int, int] = (64, 64),
) -> PageLayout:
    """A layout; groups are cut to the page."""
    return PageLayout(
        slots,
        *widths,
        *kept,
        key_bits,
        value_bits,
        min(slots, groups[0]),
        groups[1],
        dtype.itemsize,
    )


@dataclass
class Part:
    """Pages, and the numbers they were made of."""

    layout: PageLayout
    key_PSD: Tensor
    value_PSE: Tensor
    channels: tuple[Tensor, Tensor]  # of pages
    tensors: list[Tensor]


def subsets(rows: int, kept: int, width: int) -> Tensor:
    """Ascending channels of each row; more than there are: all, then those that have two codes."""
    if kept > width:
        whole = torch.arange(width).repeat(rows, 1).short()
        return torch.cat([whole, subsets(rows, kept - width, width)], dim=1)
    return torch.stack([torch.randperm(width)[:kept].sort().values for _ in range(rows)]).short()


def make_part(
    layout: PageLayout, pages_of_rows: list[int], dtype: torch.dtype, holes: bool
) -> Part:
    """Rows of whole pages in shuffled order; a fifth of the slots are holes."""
    rows, width = len(pages_of_rows), max(pages_of_rows) + 1
    pages = rows * width
    table_RW = torch.randperm(pages).view(rows, width).int()
    own = [
        subsets(rows, *pair)
        for pair in ((layout.key_kept, layout.key_width), (layout.value_kept, layout.value_width))
    ]
    of_pages = [x.new_empty(pages, x.shape[1]) for x in own]
    for row in range(rows):
        for mine, theirs in zip(own, of_pages, strict=True):
            theirs[table_RW[row].long()] = mine[row]
    key_PSD = torch.randn(pages, layout.slots, layout.key_width).to(dtype)
    value_PSE = (torch.randn(pages, layout.slots, layout.value_width) * 2 + 1).to(dtype)
    if layout.boosted:
        page_PX = packing.pack(layout, key_PSD, value_PSE, (of_pages[0], of_pages[1]))
    else:
        pack = implementation("pack", "reference")
        page_PX = pack(key_PSD, value_PSE, *of_pages, list(layout))
    position_PS = torch.randint(0, 10**6, (pages, layout.slots)).int()
    position_PS[torch.rand(position_PS.shape) < 0.2] = -1
    none = torch.empty(0)
    counts_R = torch.tensor(pages_of_rows) * layout.slots
    tensors = [page_PX, *own, table_RW, counts_R]
    tensors += [position_PS if holes else none.int(), none, none.long()]
    return Part(layout, key_PSD, value_PSE, (of_pages[0], of_pages[1]), tensors)
