"""Rows of old slots whose pages may be in any tier.

What is written again and again (positions where slots are dropped, masses) stays on the device, a
few bytes for each slot; what a page packs never changes. `span` pages of a row in a row go down
together, with those of the other heads of their sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import POSITION, REF, Column
from kvpress.store.boxes import boxes_of
from kvpress.store.packed import PackedRows
from kvpress.store.session import load_pages, slices_of
from kvpress.store.spans import Whole, single, span_pages, whole_spans
from kvpress.store.spilling import spill
from kvpress.store.steps import Brought, Steps
from kvpress.store.tiered_memory import TieredMemory, Used
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.record import Owner
from kvpress.store.tiers.tiers import Tiers


def ref_columns() -> dict[str, Column]:
    """What stands in the place of a page: its number on the shelf."""
    return {REF: Column((), torch.int64, whole=True, on_host=True)}


class TieredPages(PackedRows):
    """Old slots of one layer in one layout, whose pages are where `tiers` has room.

    name: the layer and the number of the layout, which stand in every record. unit: the most bytes
    that a span of all heads has in any layout of the layer.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        layout: PageLayout,
        columns: Mapping[str, Column],
        like: Tensor,
        ordered: bool,
        *,
        tiers: Tiers,
        name: tuple[int, int],
        unit: int,
        cells: int | None = None,
    ) -> None:
        self.name, self.span = name, span_pages(layout)
        super().__init__(sequences, heads, layout, columns, like, ordered, cells)
        beside = 0 if ordered else layout.slots * 4  # positions, as they were sealed
        self.shelf = tiers.shelf(like.device, layout.page_bytes, beside, unit)
        self._used: Used | None = None
        self.steps = Steps(self.shelf)
        _join(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.shelf.tiers.tenants.add(self)

    # Whole pages

    def _bytes(self) -> dict[str, Column]:
        return ref_columns()

    def packed(self, page_A: Tensor) -> Tensor:
        """What is packed of some pages of the pool (on the host): uint8 `[A, page_bytes]`, a copy.

        Raises TierError.
        """
        return self.shelf.read(self.paging.pages(REF)[page_A])

    def put(
        self, row_A: Tensor, place_A: Tensor, page_AX: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Writes whole pages at some places of rows: what is packed, and `[A, S]` per column.

        Spans that are complete with them stay on the device as far as there is room. Raises
        TierError.
        """
        with self.shelf.tiers.lock:
            id_A = self.shelf.directory.enter(len(row_A))
            beside = boxes_of(self, row_A, page_AX, columns)
            self.fields.put_pages(row_A, place_A, {**columns, **beside, REF: id_A})
            position_AS = columns.get(POSITION) if POSITION in self.paging.columns else None
            self._settle(row_A, place_A, id_A, page_AX, position_AS)

    def _settle(
        self,
        row_A: Tensor,
        place_A: Tensor,
        id_A: Tensor,
        page_AX: Tensor,
        position_AS: Tensor | None,
    ) -> None:
        """Puts new pages into tiers: those of open spans on the device, whatever goes for it."""
        self._used = None  # a table whose pages are written anew stays the same
        self.steps.bare = True
        every_A = host.full((len(row_A),), 1, torch.bool)
        whole = list(whole_spans(self.paging.table, self.span, row_A, place_A, every_A))
        open_A = host.full((len(row_A),), 1, torch.bool)
        for group in whole:
            open_A[group.entry_NP] = False
        device = page_AX.device
        span_A = (place_A // self.span).where(open_A, -1)
        for span in torch.unique(span_A[open_A]).tolist():  # one that is complete then makes room
            entry_A = (span_A == span).nonzero().flatten()
            self.shelf.put(id_A[entry_A], page_AX[entry_A.to(device)], self)
        for group in whole:
            flat_A = group.entry_NP.flatten()
            pages_AX = page_AX[flat_A.to(device)]
            if not self.shelf.tiers.fits(len(flat_A) * self.layout.page_bytes, self.shelf.arena):
                position = None if position_AS is None else position_AS[flat_A.to(device)]
                self.seal(group, id_A[group.entry_NP], pages_AX, position)
            else:
                self.shelf.put(id_A[flat_A], pages_AX, self)

    def seal(
        self, group: Whole, id_NP: Tensor, page_AX: Tensor, position_AS: Tensor | None
    ) -> None:
        """Makes a record of a span. Where steps choose pages, each can be read alone.

        Raises TierError.
        """
        if self.cells is not None:
            group = single(group)
            id_NP = id_NP.view(-1, 1)
        first = group.span * self.span * self.layout.slots
        slice_NX, known = slices_of(len(id_NP), page_AX, position_AS)
        first = first if position_AS is None else known
        slots = id_NP.shape[1] * self.layout.slots
        owner = Owner(*self.name, group.sequence, group.heads, first, slots)
        self.shelf.put_below(id_NP, slice_NX, owner)

    # As tiers ask

    def ids_in_use(self) -> Tensor:
        """The numbers of the pages on the shelf: int64, on the host; some may stand twice."""
        return self.used().id_A

    def used(self) -> Used:
        """The pages with slots: looked for where the table is another one than the last time."""
        if self._used is None or not self._used.holds(self.paging.table):
            self._used = Used.of(self.paging)
        return self._used

    def spill(self, least: int) -> None:
        """Sends pages to a lower tier: those that no step chose, then whole spans, the last first.

        Raises TierError.
        """
        spill(self, least, every=True)

    def thin(self, least: int) -> None:
        """The same of pages without a copy that the last step did not choose. Raises TierError."""
        if self.steps.bare:
            self.steps.bare = spill(self, least, every=False)

    def bring(self, id_A: Tensor, staged: bool) -> Brought:
        """Brings the pages that a step chose to the device: see `Steps.bring`."""
        return self.steps.bring(id_A, staged, self)

    def positions(self, page_A: Tensor) -> Tensor | None:
        """The positions of pages, where they are kept."""
        if POSITION not in self.paging.columns:
            return None
        return self.paging.pages(POSITION)[page_A.to(self.like.device)]

    # Whole sequences, files and checks

    def select_sequences(self, index: Sequence[int]) -> TieredPages:
        """Rows whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        chosen = super().select_sequences(index)
        assert isinstance(chosen, TieredPages), "it is a copy of this"
        _join(chosen)
        return chosen

    def unshare(self) -> None:
        """Gives every row pages of its own, also where several had the same bytes."""
        super().unshare()
        table, ref_P = self.paging.table, self.paging.pages(REF)
        with self.shelf.tiers.lock:
            _, _, row_A, place_A, page_A, _ = self.used()
            again_A = torch.ones(len(page_A), dtype=torch.bool, device="cpu")
            again_A[_first_of_each(ref_P[page_A])] = False
            span_A = (place_A // self.span).where(again_A, -1)
            for span in range(int(span_A.max()) + 1 if len(span_A) else 0):
                mine = span_A == span
                page_AX = self.shelf.read(ref_P[page_A[mine]])
                id_A = ref_P[page_A[mine]] = self.shelf.directory.enter(len(page_AX))
                position_AS = self.positions(page_A[mine])
                self._settle(row_A[mine], place_A[mine], id_A, page_AX, position_AS)
            table.set_pages(table.pages_RW.clone())  # what was planned for them holds no more

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what a session has. Raises CacheError if that cannot be, TierError."""
        load_pages(self, state)

    def check_integrity(self) -> bool:
        """True if every page is whole, known and somewhere. Raises CacheError otherwise."""
        own, id_A = self.shelf.directory, self.ids_in_use()
        if bool(((own.at_P[id_A] == NOWHERE) & (own.record_P[id_A] == NOWHERE)).any()):
            raise CacheError("A page is in no tier.")
        return super().check_integrity()


def _join(rows: TieredPages) -> None:
    """Makes what follows from the pages of rows, and tells the tiers of them."""
    rows.memory = TieredMemory(rows.fields, rows.shelf)
    rows.steps = rows.steps.copied()
    rows.shelf.tiers.tenants.add(rows)


def _first_of_each(value_A: Tensor) -> Tensor:
    """Where each value stands first, by ascending values."""
    order_A = value_A.argsort(stable=True)
    counts = torch.unique_consecutive(value_A[order_A], return_counts=True)[1]
    return order_A[counts.cumsum(0) - counts]
