"""Rows of old slots: whole pages in one format. What is dropped from them leaves a hole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import KEY, MASS, PAGE, POSITION, VALUE, Column
from kvpress.store.packing import pack
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Layouts
from kvpress.types import EMPTY

_MOST_HOLES = 8  # an eighth of the old slots of a row, or a page of them, may be holes


class PackedRows(PagedRows):
    """Old slots of one layer, all in the layout of their pages.

    `key_channels_RT` and `value_channels_RU` say which channels each row keeps; whoever owns this
    store sets them. columns: what is kept of a slot besides. ordered: nothing is ever dropped, and
    slot s of a row holds token s: then no positions are stored.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        layout: PageLayout,
        columns: Mapping[str, Column],
        like: Tensor,
        ordered: bool,
    ) -> None:
        self.layout, self.like = layout, like
        page = Column((layout.page_bytes,), torch.uint8, whole=True)
        super().__init__(
            sequences, heads, {PAGE: page, **columns}, layout.slots, like.device, ordered
        )
        self.dropped = host.zeros(sequences * heads)  # on the host
        self.key_channels_RT = self.value_channels_RU = host.zeros(0, dtype=torch.int16)
        # What operators get where there are no positions, no mass, no counts on their device.
        self._none = [like.new_empty(0, dtype=t) for t in (torch.int32, torch.float32, torch.int64)]

    @property
    def held(self) -> Tensor:
        """Slots of every row that hold a token: int64 `[R]`, on the host."""
        return self.counts - self.dropped

    def part(self) -> list[Tensor]:
        """The tensors that operators take; see kvpress/layout.py."""
        no_position, no_mass, no_counts = self._none
        pool, channels = self._pool.by_name, (self.key_channels_RT, self.value_channels_RU)
        position, mass = pool.get(POSITION, no_position), pool.get(MASS, no_mass)
        dropped = self.dropped if self.on_host else no_counts
        return [pool[PAGE], *channels, *self.operands(), position, mass, dropped]

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""
        return super().row_bytes() + self.dropped.element_size()

    def add(self, row_N: Tensor, page_NX: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Adds whole pages to rows (int64 on the host, ascending; several pages may go to one).

        columns: positions and what else is kept per slot, `[N, S]`.
        """
        if not len(row_N):
            return
        rank_N = host.arange(len(row_N)) - torch.searchsorted(row_N, row_N)
        place_N = self.counts[row_N] // self.page_slots + rank_N
        counts = self.counts.index_add(0, row_N, torch.full_like(row_N, self.page_slots))
        self._reserve(counts)
        self._set_counts(counts)
        self._write(row_N, place_N, page_NX, columns)

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column; keys and values unpacked, zeros where channels were dropped.

        What stands in holes is arbitrary, their position is empty.
        """
        rows = self.row_index(range(self.sequences) if sequences is None else sequences)
        batch = len(rows) // self.heads
        if name == POSITION and name not in self.columns:
            slot_S = host.arange(int(self.counts[rows].max()) if len(rows) else 0)
            position_RS = slot_S.where(slot_S < self.counts[rows, None], EMPTY)
            return position_RS.view(batch, self.heads, -1).to(self.device, torch.int32)
        if name not in (KEY, VALUE):
            return super().dense(name, sequences)
        places_R = self.counts[rows] // self.page_slots
        width = int(places_R.max()) if len(rows) else 0
        used_RW = host.arange(width) < places_R[:, None]
        row_N, place_N = used_RW.nonzero().unbind(1)
        values_NSD = self._unpack(rows[row_N], place_N)[name == VALUE]
        full = values_NSD.new_zeros(len(rows), width, *values_NSD.shape[1:])
        full[row_N, place_N] = values_NSD
        return full.view(batch, self.heads, width * self.page_slots, values_NSD.shape[2])

    def evict_one(
        self, row_N: Tensor, slot_N: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot of each of some rows."""
        drops_NS = host.zeros(len(row_N), int(self.counts[row_N].max()), dtype=torch.bool)
        drops_NS[host.arange(len(row_N)), slot_N.cpu()] = True
        self._drop(row_N, drops_NS)

    def select_sequences(self, index: Sequence[int]) -> PackedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        chosen = super().select_sequences(index)
        assert isinstance(chosen, PackedRows), "a copy"
        chosen.dropped = self.dropped[self.row_index(index)]
        return chosen

    def own(self) -> None:
        """Gives every row pages of its own."""
        if self._pool.lent:
            self._own_pages(*self._held_RW.nonzero().unbind(1))

    def take_last(self, tokens_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Removes whole pages with at least so many tokens of each row: how many slots, and them.

        int64 `[R]`; keys, values and all other columns dense, `[B, H, S, ...]`, slots in front.
        """
        pages_R = -(-tokens_R // self.page_slots)
        first_R = self.counts // self.page_slots - pages_R
        width = int(pages_R.max()) * self.page_slots
        slot_RS = first_R[:, None] * self.page_slots + host.arange(width)
        taken = {}
        for name in (KEY, VALUE, POSITION, *self._volatile):
            column = self.dense(name).flatten(0, 1)
            index = slot_RS.clamp(0, max(0, column.shape[1] - 1)).to(column.device)
            index = index.view(*index.shape, *[1] * (column.dim() - 2))
            moved = column.gather(1, index.expand(*slot_RS.shape, *column.shape[2:]))
            taken[name] = moved.view(self.sequences, self.heads, *moved.shape[1:])
        left_R = first_R * self.page_slots
        self._set_counts(left_R)
        self._owned = torch.minimum(self._owned, self._pages_for(left_R))
        self._set_table(self._table[:, : int(self._owned.max())])
        self._pool.trim()
        return pages_R * self.page_slots, taken

    def compact(self) -> None:
        """Packs pages with many holes again, as far as a page or more is gained."""
        most_R = (self.counts // _MOST_HOLES).clamp_min(self.page_slots)
        rows = (self.dropped > most_R).nonzero().flatten().tolist()
        if rows and self._aside is not None:
            self.own()
            self._end_aside()
        for row in rows:
            self._compact_row(row)

    def _compact_row(self, row: int) -> None:
        """Moves what is left of the emptiest pages into as few as hold it."""
        size, pages = self.page_slots, int(self.counts[row]) // self.page_slots
        page_P = self._table[row, :pages].long().to(self.device)
        holes_P = (self._pool.by_name[POSITION][page_P] == EMPTY).sum(1).cpu()
        order_P = holes_P.argsort(descending=True, stable=True)
        gained_P = holes_P[order_P].cumsum(0) // size
        gained = int(gained_P[-1])
        fewest = int((gained_P < gained).sum()) + 1  # pages that gain as much as all do
        place_N, kept = order_P[:fewest].sort().values, fewest - gained
        if kept:  # otherwise they are nothing but holes
            self._refill(row, place_N, kept)
        self.dropped[row] -= gained * size
        self._let_go(row, pages, place_N[kept:])

    def _refill(self, row: int, place_N: Tensor, kept: int) -> None:
        """Packs what is left of some pages of a row into the first `kept` of them."""
        size, row_N = self.page_slots, torch.full_like(place_N, row)
        page_N = self._table[row, place_N].long().to(self.device)
        live_L = (self._pool.by_name[POSITION][page_N] != EMPTY).flatten().nonzero().flatten()
        # A page that is not full repeats its last slot: holes must not change steps.
        from_K = live_L[torch.arange(kept * size, device=self.device).clamp_max(len(live_L) - 1)]
        key, value = (x.flatten(0, 1)[from_K] for x in self._unpack(row_N, place_N))
        shape, channels = (kept, size, -1), self.channels(row_N[:kept])
        page_NX = pack(self.layout, key.view(shape), value.view(shape), channels)
        columns = {
            name: self._pool.by_name[name][page_N].flatten()[from_K]
            for name in self.columns
            if name != PAGE
        }
        columns[POSITION][len(live_L) :] = EMPTY
        if self._pool.lent:
            self._own_pages(row_N[:kept], place_N[:kept])
        slots = {name: column.view(kept, size) for name, column in columns.items()}
        self._write(row_N[:kept], place_N[:kept], page_NX, slots)

    def _let_go(self, row: int, pages: int, place_N: Tensor) -> None:
        """Takes some pages out of a row; it keeps them as room behind the others."""
        place_P, table = host.arange(pages), self._table.clone()
        stays_P = ~torch.isin(place_P, place_N)
        order_P = torch.cat([place_P[stays_P], place_N])
        table[row, :pages] = self._table[row, order_P]
        self._set_table(table)
        left = self.counts.clone()
        left[row] = int(stays_P.sum()) * self.page_slots
        self._shorten(left)

    def _write(
        self, row_N: Tensor, place_N: Tensor, page_NX: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Fills pages of rows, which nobody shares."""
        page_N = self._table[row_N, place_N].long().to(self.device)
        self._pool.by_name[PAGE].index_copy_(0, page_N, page_NX)
        for name, column in self.columns.items():
            if name == PAGE:
                continue
            if self._aside is not None and name in self._aside:
                slot_NS = place_N[:, None] * self.page_slots + host.arange(self.page_slots)
                self._aside.write(name, row_N, slot_NS, columns[name])
            else:
                self._pool.by_name[name].index_copy_(0, page_N, columns[name].to(column.dtype))

    def _drop(self, row_R: Tensor, drops_RS: Tensor) -> None:
        row_N, slot_N = drops_RS.nonzero().unbind(1)
        if not len(row_N):
            return
        row_N = row_R[row_N]
        if self._pool.lent:
            places = torch.unique(torch.stack([row_N, slot_N // self.page_slots], 1), dim=0)
            self._own_pages(*places.unbind(1))
        address_N = self._host_address(row_N, slot_N).to(self.device)
        self._pool.by_name[POSITION].view(-1)[address_N] = EMPTY
        self.dropped.index_add_(0, row_N, torch.ones_like(row_N))

    def _unpack(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        page_N = self._table[row_N, place_N].long().to(self.device)
        packed_NX = self._pool.by_name[PAGE][page_N]
        return ops.unpack(packed_NX, *self.channels(row_N), list(self.layout), self.like)

    def channels(self, row_N: Tensor) -> tuple[Tensor, Tensor]:
        """The kept channels of some rows (int64, on the host)."""
        row_N = row_N.to(self.device)
        return self.key_channels_RT[row_N], self.value_channels_RU[row_N]

    def _books(self) -> Iterator[Tensor]:
        """The tensors of the table itself."""
        yield from super()._books()
        yield self.dropped

    @property
    def _places_RW(self) -> Tensor:
        head_R = host.arange(len(self.counts)) % self.heads  # pages of a row stand in any order
        return head_R[:, None].expand(-1, self._table.shape[1])

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold: tensors on the host."""
        return {**super().state(), "dropped": self.dropped.clone()}

    def load(self, state: Mapping[str, Tensor], layouts: Layouts | None = None) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        super().load(state)
        self.dropped = state["dropped"].clone()

    @property
    def _counters(self) -> tuple[str, ...]:
        return (*super()._counters, "dropped")

    def check_integrity(self) -> bool:
        """True if every page is whole and known. Raises CacheError otherwise."""
        if bool((self.counts % self.page_slots).any()):
            raise CacheError(
                f"Rows hold {self.counts.tolist()} old slots, which are no whole pages."
            )
        return super().check_integrity()
