"""What is kept beside a page of old slots so that a step can tell whether to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import BOX, LENGTH, POSITION, SPAN, Column
from kvpress.store.paging import Paging
from kvpress.types import EMPTY

BESIDE = (BOX, LENGTH, SPAN)  # columns of pages that choosing needs


def box_columns(layout: PageLayout, dtype: torch.dtype, box: int) -> dict[str, Column]:
    """The columns: 1/box of the bytes of its keys and values for each page, and 16.

    box: slots of a box; a page has as many as fill it.
    """
    return {
        BOX: Column((layout.slots // box, 2, layout.key_width), dtype, whole=True),
        LENGTH: Column((2,), torch.float32, whole=True),
        SPAN: Column((2,), torch.int32, whole=True),
    }


class Boxed(Protocol):
    """Rows of old slots. box: slots of a box; None: they have none."""

    layout: PageLayout
    like: Tensor
    box: int | None

    def channels(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """The kept channels of some rows."""


def boxes_of(
    rows: Boxed, row_A: Tensor, page_AX: Tensor, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What these columns hold of new pages of rows. columns: positions, EMPTY without a token."""
    if rows.box is None:
        return {}
    channels, position_AS = rows.channels(row_A), columns[POSITION]
    box_A2D, length_A2 = ops.page_bounds(page_AX, *channels, list(rows.layout), rows.like)
    box_AX2D = box_A2D[:, None]
    if rows.box < rows.layout.slots:
        box_AX2D = _smaller(rows.layout, rows.like, page_AX, channels, rows.box)
    last_A = position_AS.amax(1)
    first_A = position_AS.where(position_AS != EMPTY, torch.iinfo(torch.int32).max).amin(1)
    return {BOX: box_AX2D, LENGTH: length_A2, SPAN: torch.stack([first_A, last_A], dim=1).int()}


def _smaller(
    layout: PageLayout, like: Tensor, page_AX: Tensor, channels: tuple[Tensor, Tensor], box: int
) -> Tensor:
    """The boxes `[A, S / box, 2, D]` of parts of pages."""
    key_ASD, _ = ops.unpack(page_AX, *channels, list(layout), like)
    key_AXSD = torch.unflatten(key_ASD, 1, (-1, box))
    low_AXD, high_AXD = key_AXSD.amin(2), key_AXSD.amax(2)
    if layout.key_bits < 16 and like.dtype != torch.float32:  # they were rounded: wider by a step
        low_AXD = torch.nextafter(low_AXD, low_AXD.new_full((), -torch.inf))
        high_AXD = torch.nextafter(high_AXD, high_AXD.new_full((), torch.inf))
    return torch.stack([low_AXD, high_AXD], dim=2)


def check_boxes(paging: Paging) -> None:
    """Raises CacheError for boxes that no page has. A file may hold anything."""
    if BOX not in paging.columns:
        return
    page_A = paging.owned_pages().to(paging.table.device)
    box_AX2D, length_A2 = (paging.pages(name)[page_A] for name in (BOX, LENGTH))
    low_AXD, high_AXD = box_AX2D.float().unbind(2)
    if not bool((low_AXD <= high_AXD).all()) or not bool((length_A2 >= 0).all()):
        raise CacheError("Boxes of pages have no inside, or are no numbers.")
