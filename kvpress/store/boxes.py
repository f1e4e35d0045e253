"""What is kept beside a page of old slots so that a step can tell whether to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import CacheError
from kvpress.formulas.page_cells import cell_bytes
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import BOX, CELL, LENGTH, POSITION, SPAN, Column
from kvpress.store.paging import Paging
from kvpress.types import EMPTY

BESIDE = (BOX, CELL, LENGTH, SPAN)  # columns of pages that choosing needs


def box_columns(layout: PageLayout, dtype: torch.dtype, cells: int) -> dict[str, Column]:
    """The columns: 1/S of the bytes of keys and values, `cells` bits of each key, and 16.

    cells: bits of the number of the cell that a key is in; 0: there are none.
    """
    columns = {
        BOX: Column((2, layout.key_width), dtype, whole=True),
        LENGTH: Column((2,), torch.float32, whole=True),
        SPAN: Column((2,), torch.int32, whole=True),
    }
    if cells:
        size = cell_bytes(layout.key_width, layout.slots, cells)
        columns[CELL] = Column((size,), torch.uint8, whole=True)
    return columns


class Boxed(Protocol):
    """Rows of old slots. cells: as in `box_columns`; None: they have no boxes."""

    layout: PageLayout
    like: Tensor
    cells: int | None

    def channels(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """The kept channels of some rows."""


def boxes_of(
    rows: Boxed, row_A: Tensor, page_AX: Tensor, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What these columns hold of new pages of rows. columns: positions, EMPTY without a token."""
    if rows.cells is None:
        return {}
    packed = (page_AX, *rows.channels(row_A), list(rows.layout), rows.like)
    box_A2D, length_A2, cell_AY = ops.page_bounds(*packed, rows.cells)
    position_AS = columns[POSITION]
    last_A = position_AS.amax(1)
    first_A = position_AS.where(position_AS != EMPTY, torch.iinfo(torch.int32).max).amin(1)
    span_A2 = torch.stack([first_A, last_A], dim=1).int()
    made = {BOX: box_A2D, LENGTH: length_A2, SPAN: span_A2}
    return {**made, CELL: cell_AY} if rows.cells else made


def check_boxes(paging: Paging) -> None:
    """Raises CacheError for boxes that no page has. A file may hold anything."""
    if BOX not in paging.columns:
        return
    page_A = paging.owned_pages().to(paging.table.device)
    box_A2D, length_A2 = (paging.pages(name)[page_A] for name in (BOX, LENGTH))
    low_AD, high_AD = box_A2D.float().unbind(1)
    if not bool((low_AD <= high_AD).all()) or not bool((length_A2 >= 0).all()):
        raise CacheError("Boxes of pages have no inside, or are no numbers.")
