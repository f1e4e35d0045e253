"""Rows of old slots: whole pages in one format. What is dropped from them leaves a hole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import KEY, MASS, PAGE, POSITION, VALUE, Column, Survivors
from kvpress.store.boxes import box_columns, boxes_of, check_boxes
from kvpress.store.fields import Fields, check_positions
from kvpress.store.memory import PageMemory
from kvpress.store.paging import Paging, check_pages
from kvpress.store.table import PageTable
from kvpress.types import EMPTY

_DROPPED = "dropped"  # holes of every row: slots that were dropped


class PackedRows:
    """Old slots of one layer, all in the layout of their pages.

    `key_channels_RC` and `value_channels_RU` say which channels each row keeps; whoever owns this
    store sets them. columns: what is kept of a slot besides. ordered: nothing is ever dropped, and
    slot s of a row holds token s: then no positions are stored. cells: bits of the cells of keys,
    by which steps choose pages; 0: they choose by boxes alone; None: they read all.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        layout: PageLayout,
        columns: Mapping[str, Column],
        like: Tensor,
        ordered: bool,
        cells: int | None = None,
    ) -> None:
        self.layout, self.like = layout, like
        self.cells = cells
        positions = {} if ordered else {POSITION: Column((), torch.int32)}
        table = PageTable(sequences, heads, layout.slots, like.device, (_DROPPED,))
        positions |= {} if cells is None else box_columns(layout, like.dtype, cells)
        self.paging = Paging({**self._bytes(), **columns, **positions}, table)
        self.fields = Fields(self.paging)
        self.memory = PageMemory(self.fields)
        self.key_channels_RC = self.value_channels_RU = host.zeros(0, dtype=torch.int16)
        # Instead of positions, masses and counts that are not there.
        self._none = [like.new_empty(0, dtype=t) for t in (torch.int32, torch.float32, torch.int64)]

    @property
    def counts(self) -> Tensor:
        """Slots of every row, holes included: int64 `[R]`, on the host."""
        return self.paging.table.counts

    @property
    def dropped(self) -> Tensor:
        """Holes of every row: int64 `[R]`, on the host."""
        return self.paging.table.further[_DROPPED]

    @property
    def held(self) -> Tensor:
        """Slots of every row that hold a token: int64 `[R]`, on the host."""
        return self.counts - self.dropped

    def channels(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """The kept channels of some rows (int64, on the host)."""
        row_A = row_A.to(self.like.device)
        return self.key_channels_RC[row_A], self.value_channels_RU[row_A]

    def part(self, sequences: Sequence[int] | None = None) -> list[Tensor]:
        """The tensors that operators take; see formulas/page_layout.py."""
        no_position, no_mass, no_counts = self._none
        pages, table = self.paging.pool.by_name, self.paging.table
        channels = self.key_channels_RC, self.value_channels_RU
        dropped = self.dropped if table.on_host else no_counts
        if sequences is not None:
            row_R = table.row_index(sequences)
            channels = self.channels(row_R)
            dropped = dropped[row_R] if table.on_host else no_counts
        position, mass = pages.get(POSITION, no_position), pages.get(MASS, no_mass)
        return [pages[PAGE], *channels, *table.operands(sequences), position, mass, dropped]

    # Whole pages

    def _bytes(self) -> dict[str, Column]:
        """The column that holds, or finds, what is packed."""
        return {PAGE: Column((self.layout.page_bytes,), torch.uint8, whole=True)}

    def packed(self, page_A: Tensor) -> Tensor:
        """What is packed of some pages of the pool (on the host): uint8 `[A, page_bytes]`."""
        return self.paging.pages(PAGE)[page_A.to(self.like.device)]

    def put(
        self, row_A: Tensor, place_A: Tensor, page_AX: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Writes whole pages at some places of rows: what is packed, and `[A, S]` per column."""
        beside = boxes_of(self, row_A, page_AX, columns)
        self.fields.put_pages(row_A, place_A, {**columns, **beside, PAGE: page_AX})

    # Slots

    def unpack(self, row_A: Tensor, place_A: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pages at some places of rows, `[N, S, D]` and `[N, S, E]`."""
        packed_AX = self.packed(self.paging.table.pages_RW[row_A, place_A].long())
        return ops.unpack(packed_AX, *self.channels(row_A), list(self.layout), self.like)

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column; keys and values unpacked, zeros where channels were dropped.

        What stands in holes is arbitrary, their position is empty.
        """
        table = self.paging.table
        rows = table.row_index(sequences)
        batch = len(rows) // table.heads
        if name == POSITION and name not in self.paging.columns:
            slot_S = host.arange(int(self.counts[rows].max()) if len(rows) else 0)
            position_RS = slot_S.where(slot_S < self.counts[rows, None], EMPTY)
            return position_RS.view(batch, table.heads, -1).to(table.device, torch.int32)
        if name not in (KEY, VALUE):
            return self.fields.dense(name, sequences)
        places_R = self.counts[rows] // table.page_slots
        width = int(places_R.max()) if len(rows) else 0
        used_RW = host.arange(width) < places_R[:, None]
        row_A, place_A = used_RW.nonzero().unbind(1)
        values_ASD = self.unpack(rows[row_A], place_A)[name == VALUE]
        full = values_ASD.new_zeros(len(rows), width, *values_ASD.shape[1:])
        full[row_A, place_A] = values_ASD
        return full.view(batch, table.heads, width * table.page_slots, values_ASD.shape[2])

    def add(
        self, row_A: Tensor, page_AX: Tensor, columns: Mapping[str, Tensor], holes_A: Tensor
    ) -> None:
        """Adds pages to rows (int64 on the host, ascending; several pages may go to one).

        columns: positions and what else is kept per slot, `[N, S]`; EMPTY in `holes_A` of them.
        """
        if not len(row_A):
            return
        slots = self.paging.table.page_slots
        # Equal rows are neighbours: the first of them stands where a search finds it.
        rank_A = host.arange(len(row_A)) - torch.searchsorted(row_A, row_A)
        place_A = self.counts[row_A] // slots + rank_A
        counts = self.counts.index_add(0, row_A, torch.full_like(row_A, slots))
        self.paging.reserve(counts)
        self.paging.table.set_counts(counts)
        self.dropped.index_add_(0, row_A, holes_A)
        self.put(row_A, place_A, page_AX, columns)

    def evict_one(self, row_A: Tensor, slot_A: Tensor) -> None:
        """Drops one slot of each of some rows."""
        drops_AS = host.zeros(len(row_A), int(self.counts[row_A].max()), dtype=torch.bool)
        drops_AS[host.arange(len(row_A)), slot_A.cpu()] = True
        self._drop(row_A, drops_AS)

    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; their volatile columns are renewed."""
        position_BHS = self.dense(POSITION, survivors.sequences).long()
        if position_BHS.numel():
            drops_RS = self.fields.renew(survivors, position_BHS)
            self._drop(self.paging.table.row_index(survivors.sequences), drops_RS)

    def _drop(self, row_R: Tensor, drops_RS: Tensor) -> None:
        row_A, slot_A = drops_RS.nonzero().unbind(1)
        if not len(row_A):
            return
        row_A = row_R[row_A]
        self.paging.own_slots(row_A, slot_A)
        address_A = self.paging.table.host_address(row_A, slot_A).to(self.like.device)
        self.paging.pages(POSITION).view(-1)[address_A] = EMPTY
        self.dropped.index_add_(0, row_A, torch.ones_like(row_A))

    def let_go(self) -> None:
        """Gives back the pages of rows whose slots were all dropped."""
        empty_R = self.dropped == self.counts
        if bool(self.counts[empty_R].any()):
            self.dropped[empty_R] = 0
            self.paging.truncate(self.counts * ~empty_R)

    # Whole sequences

    def select_sequences(self, index: Sequence[int]) -> PackedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        chosen = copy.copy(self)
        chosen.fields = self.fields.share(index)
        chosen.paging, chosen.memory = chosen.fields.paging, PageMemory(chosen.fields)
        return chosen

    def unshare(self) -> None:
        """Gives every row pages of its own."""
        if self.paging.pool.lent:
            self.paging.move_out()
            self.paging.own(*self.paging.table.held_RW.nonzero().unbind(1))

    # Files and checks

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold: tensors on the host."""
        return self.fields.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        self.fields.load(state)

    def check_integrity(self) -> bool:
        """True if every page is whole and known. Raises CacheError otherwise."""
        table = self.paging.table
        if bool((self.counts % table.page_slots).any()):
            raise CacheError(
                f"Rows hold {self.counts.tolist()} old slots, which are no whole pages."
            )
        # Pages of a row stand in any order.
        check_pages(self.paging, table.head_R[:, None].expand(-1, table.pages_RW.shape[1]))
        check_positions(self.dense(POSITION), self.held)
        check_boxes(self.paging)
        return True
