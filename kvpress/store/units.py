"""What is attended to at once: the same slots of all heads of one sequence, by numbers of pages.

A unit is one or more chunks, as the operator `attend_parts` cuts rows, of whole pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import POSITION, REF
from kvpress.store.tiered import TieredPages
from kvpress.types import EMPTY

CHUNK = 512  # slots, as operators cut rows


def unit_pages(layout: PageLayout) -> int:
    """Pages of a row in a unit."""
    return math.lcm(CHUNK, layout.slots) // layout.slots


def unit_bytes(heads: int, layouts: Sequence[PageLayout]) -> int:
    """The most bytes of a unit of all heads of a sequence, in any of these layouts.

    With a page more, which may be lost since pages begin at multiples of their size.
    """
    most = max(unit_pages(layout) * layout.page_bytes for layout in layouts)
    return heads * most + max(layout.page_bytes for layout in layouts)


class Units(NamedTuple):
    """The units of some sequences in pages of one layout: u of them, of W pages of each head."""

    rows: TieredPages
    unit_u: Tensor  # its number; int64, on the host, as all of them
    sequence_u: Tensor  # the place of the sequence among the chosen ones
    id_uHW: Tensor  # numbers on the shelf; NOWHERE where a row has no such page
    page_uHW: Tensor  # numbers in the pool of what is kept besides
    count_uH: Tensor  # slots
    key_channels_XC: Tensor  # int16, on the device: of every unit and head
    value_channels_XU: Tensor

    @property
    def layout(self) -> PageLayout:
        """How the pages lie in memory."""
        return self.rows.layout

    @property
    def chunks(self) -> int:
        """Chunks of a unit."""
        return unit_pages(self.layout) * self.layout.slots // CHUNK

    @property
    def drops(self) -> bool:
        """Whether slots of these pages may be dropped: their positions say so."""
        return POSITION in self.rows.paging.columns

    @property
    def held_uHW(self) -> Tensor:
        """Which pages there are: bool."""
        return self.id_uHW >= 0

    def at(self, at_P: Tensor | None = None) -> Tensor:
        """Where on the device pages are, NOWHERE where they are not. at_P: of all pages."""
        at_P = self.rows.shelf.directory.at_P if at_P is None else at_P
        at_uHW = torch.full_like(self.id_uHW, EMPTY)
        held = self.held_uHW
        at_uHW[held] = at_P[self.id_uHW[held]]
        return at_uHW

    def mixed(self, at_uHW: Tensor) -> bool:
        """Whether sequences share a page at a place of which they dropped different slots.

        What operators take has one list of positions for each page.
        """
        held = self.held_uHW & (at_uHW >= 0)
        if not self.drops or not bool(held.any()):
            return False
        at_A, page_A = at_uHW[held], self.page_uHW[held]
        both_A = torch.unique(at_A * (int(page_A.max()) + 1) + page_A)
        return len(both_A) > len(torch.unique(at_A))

    def some(self, index_u: Tensor) -> Units:
        """Some of these units."""
        heads = self.id_uHW.shape[1]
        row_X = (index_u[:, None] * heads + host.arange(heads)).flatten()
        row_X = row_X.to(self.key_channels_XC.device)
        return Units(
            self.rows,
            self.unit_u[index_u],
            self.sequence_u[index_u],
            self.id_uHW[index_u],
            self.page_uHW[index_u],
            self.count_uH[index_u],
            self.key_channels_XC[row_X],
            self.value_channels_XU[row_X],
        )

    def operands(self, at_uHW: Tensor) -> list[Tensor]:
        """The pages of this layout as operators take them, each unit as a sequence of its own.

        at_uHW: where the pages are now.
        """
        table = at_uHW.where(self.held_uHW, 0).flatten(0, 1)
        channels = (self.key_channels_XC, self.value_channels_XU)
        return self._operands(at_uHW, table, self.count_uH.flatten(), *channels)

    def whole(self, at_uHW: Tensor, batch: int) -> list[Tensor]:
        """The same, as whole rows of so many sequences."""
        heads, pages = self.id_uHW.shape[1:]
        units = int(self.unit_u.max()) + 1
        table = at_uHW.new_zeros(batch, heads, units, pages)
        table[self.sequence_u, :, self.unit_u] = at_uHW.where(self.held_uHW, 0)
        counts = self.count_uH.new_zeros(batch, heads)
        counts.index_add_(0, self.sequence_u, self.count_uH)
        # Channels belong to rows: any unit of a sequence has them. Rows without units need none.
        first_b = self.sequence_u.new_zeros(batch)
        first_b[self.sequence_u] = host.arange(len(self.sequence_u))
        row_R = (first_b[:, None] * heads + host.arange(heads)).flatten()
        row_R = row_R.to(self.key_channels_XC.device)
        channels = (self.key_channels_XC[row_R], self.value_channels_XU[row_R])
        return self._operands(at_uHW, table.flatten(2).flatten(0, 1), counts.flatten(), *channels)

    def _operands(
        self, at_uHW: Tensor, table_RW: Tensor, count_R: Tensor, *channels: Tensor
    ) -> list[Tensor]:
        own, device = self.rows, self.rows.like.device
        none = own.like.new_empty(0, dtype=torch.float32)
        position = own.like.new_empty(0, dtype=torch.int32)
        if self.drops:
            held = self.held_uHW
            position = own.shelf.positions(self.layout.slots)
            kept = own.paging.pages(POSITION)
            position[at_uHW[held].to(device)] = kept[self.page_uHW[held].to(device)]
        where = (table_RW.to(device, torch.int32), count_R.to(device))
        return [own.shelf.pages, *channels, *where, position, none, none.long()]


def units_of(
    rows: TieredPages,
    sequences: Sequence[int] | None,
    some: tuple[Tensor, Tensor] | None = None,
) -> Units:
    """The units of some sequences, or of all, the first ones of all sequences first.

    some: as if their rows had these pages alone: places in the rows, and how many.
    """
    table, size = rows.paging.table, rows.layout.slots
    row_R = table.row_index(sequences)
    heads, pages = table.heads, unit_pages(rows.layout)
    page_RW, pages_R = table.pages_RW[row_R], rows.counts[row_R] // size
    if some is not None:
        place_RW, pages_R = (x.cpu() for x in some)
        page_RW = page_RW.gather(1, place_RW.long().clamp_min(0))
    units = -(-int(pages_R.max()) // pages) if len(row_R) else 0
    place_W = host.arange(units * pages)
    held_RW = place_W < pages_R[:, None]
    page_RW = torch.nn.functional.pad(page_RW, (0, units * pages))
    page_RW = page_RW[:, : units * pages].long().where(held_RW, 0)
    id_RW = rows.paging.pages(REF)[page_RW].where(held_RW, EMPTY) if units else page_RW
    shape = (len(row_R) // heads, heads, units, pages)

    def by_unit(entry_RW: Tensor) -> Tensor:
        return entry_RW.view(shape).permute(2, 0, 1, 3).flatten(0, 1)

    id_uHW = by_unit(id_RW)
    used_u = (id_uHW >= 0).flatten(1).any(1).nonzero().flatten()
    id_uHW = id_uHW[used_u]
    row_bH = row_R.view(-1, heads)
    chosen = row_bH[used_u % max(1, shape[0])].flatten() if len(used_u) else row_R[:0]
    return Units(
        rows,
        used_u // max(1, shape[0]),
        used_u % max(1, shape[0]),
        id_uHW,
        by_unit(page_RW)[used_u],
        (id_uHW >= 0).sum(2) * size,
        *rows.channels(chosen),
    )
