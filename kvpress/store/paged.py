"""Ragged rows in one pool of pages: the device tier, in model dtype.

The order of slots inside a row is free: keys are stored rotated, at their own positions, so that
evicting one slot and appending a token is one overwrite. Beams and forks share pages: a page with
several users is copied before one of them writes to it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.host import lasting
from kvpress.store.base import KEY, POSITION, VALUE, Column, Survivors
from kvpress.store.overlay import Aside
from kvpress.store.rows import Layouts, Rows, by_position
from kvpress.store.saved import check_rows
from kvpress.store.table import PageTable
from kvpress.store.tiers.device import PagePool
from kvpress.types import EMPTY


class PagedRows(PageTable, Rows):
    """The slots of one layer: `sequences × heads` rows of pages.

    Args: columns: the fields of a slot; `position` (int32) is added. page_slots: slots in a page.
    ordered: slot s of a row always holds token s, so that no positions are needed.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        columns: Mapping[str, Column],
        page_slots: int,
        device: torch.device,
        ordered: bool = False,
    ) -> None:
        super().__init__(sequences, heads, page_slots, device)
        positions = {} if ordered else {POSITION: Column((), torch.int32)}
        self.columns = {**columns, **positions}
        self.most_pages = 2**62  # the pool is never grown beyond what rows may come to need
        self._aside: Aside | None = None  # the volatile columns while pages are shared
        self._join(PagePool(self.columns, page_slots, device, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive: pages, tables and counts.

        A pool of one store counts with its free pages, one that forks share as far as it is used.
        """
        tensors = list(self.tensors() if len(self._pool.members) == 1 else self._beside())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        used = 0 if len(self._pool.members) == 1 else len(torch.unique(self.owned_pages()))
        return sum(storages.values()) + used * self._pages_nbytes

    @property
    def room(self) -> int:
        """Slots of the pages that these rows keep alive, empty ones included."""
        alone = len(self._pool.members) == 1
        pages = self._pool.pages if alone else len(torch.unique(self.owned_pages()))
        return pages * self.page_slots

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores (forks) use as well."""
        if len(self._pool.members) == 1:
            return 0
        mine = torch.bincount(self.owned_pages(), minlength=self._pool.pages)
        common = int(((mine > 0) & (self._pool.uses() > mine)).sum())
        return common * self._pages_nbytes

    @property
    def _pages_nbytes(self) -> int:
        """Bytes of the slots of one page."""
        return sum(column.page_bytes(self.page_slots) for column in self.columns.values())

    @property
    def shares(self) -> bool:
        """Whether some page of these rows has other users."""
        if not self._pool.lent and self._aside is None:
            return False
        self._pool.trim()
        shared = self._pool.lent and bool((self._pool.uses()[self.owned_pages()] > 1).any())
        if not shared:
            self._end_aside()
        return shared

    def _end_aside(self) -> None:
        """Writes the volatile columns into the pages, which nobody shares any more."""
        if self._aside is not None:
            aside, self._aside = self._aside, None
            for name, column_RS in aside.columns.items():
                self._write_pages(name, column_RS, None)

    @property
    def lock(self) -> threading.RLock:
        """To be held while the pages are used: forks may run in several threads."""
        return self._pool.lock

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the store keeps alive."""
        yield from self._pool.tensors()
        yield from self._beside()

    def _beside(self) -> Iterator[Tensor]:
        """What is kept besides pages."""
        yield from self._books()
        if self._aside is not None:
            yield from self._aside.columns.values()

    def page_bytes(self) -> int:
        """Bytes that one more page costs: its slots and its entry in the page table."""
        copies = 1 if self.on_host else 2  # the host mirrors the device's table
        entries = self._table.element_size() * copies
        return self._pages_nbytes + entries

    def pool(self, name: str) -> Tensor:
        """The pages of one column, `[P, *page_shape]`, as operators read them."""
        return self._pool.by_name[name]

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        scaling: float,
        softcap: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output of new queries, and weights in the order of `dense` where asked for."""
        out_bNQE, _, weights_bNQS = ops.decode_rows(
            query_bNQD,
            self._pool.by_name[KEY],
            self._pool.by_name[VALUE],
            *self.operands(sequences),
            scaling,
            softcap,
            need_weights,
        )
        return out_bNQE, weights_bNQS if need_weights else None

    def old(self) -> tuple[list[Tensor], list[int]]:
        """Parts of old slots, as operators take them: none, since all slots are alike here."""
        return [], []

    def reserve_one(self) -> None:
        """Makes room for one more slot in every row."""
        if self._spare == 0:
            self._reserve(self.counts + 1)
            self._spare = int((self._owned * self.page_slots - self.counts).min())
        self._spare -= 1

    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did to the counts on the device.

        One token came to every row; rows above `quota_R` lost one slot. everywhere: all rows did.
        """
        if everywhere:
            self._spare += 1
        if not self.on_host:  # there the operator changed `counts` itself
            counts = self.counts + 1
            self.counts = counts if quota_R is None else counts - (counts > quota_R).long()

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1 and zeros."""
        address_RS, held_RS = self.addresses(sequences)
        shape, slot_last = self.columns[name].shape, self.columns[name].slot_last
        batch = self.sequences if sequences is None else len(sequences)
        if self._aside is not None and name in self._aside:
            rows = self.row_index(range(self.sequences) if sequences is None else sequences)
            values_RS = self._aside.rows(name, rows, address_RS.shape[1])
            return values_RS.masked_fill(~held_RS, 0).view(batch, self.heads, address_RS.shape[1])
        flat = ops.gather_slots(self._pool.by_name[name], address_RS.flatten(), slot_last)
        empty = EMPTY if name == POSITION else 0
        flat.masked_fill_(~held_RS.flatten().view(-1, *[1] * len(shape)), empty)
        return flat.view(batch, self.heads, address_RS.shape[1], *shape)

    def dense_by_position(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """All columns of some sequences, dense: each row by position, its empty slots first."""
        return by_position({name: self.dense(name, sequences) for name in self.columns})

    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`.

        Columns that are not given start at zero.
        """
        chosen = range(self.sequences) if sequences is None else sequences
        row_R, tokens = self.row_index(chosen), columns[POSITION].shape[2]
        slot_RT = self.counts[row_R, None] + host.arange(tokens)
        counts = self.counts.index_add(0, row_R, torch.full_like(row_R, tokens))
        self._reserve(counts)
        address_N = self._host_address(row_R[:, None], slot_RT).flatten().to(self.device)
        for name, column in self.columns.items():
            shape = (len(chosen), self.heads, tokens, *column.shape)
            absent = torch.zeros((), dtype=column.dtype, device=self.device)
            source = columns.get(name, absent).detach().expand(shape)
            if self._aside is not None and name in self._aside:
                self._aside.write(name, row_R, slot_RT, source.flatten(0, 1))
            else:
                self._scatter(name, address_N, source)
        self._set_counts(counts)

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""
        values_RS = values_bHS.flatten(0, 1)
        if self._aside is None:
            self._write_pages(name, values_RS, sequences)
            return
        rows = self.row_index(range(self.sequences) if sequences is None else sequences)
        slot_RS = host.arange(values_RS.shape[1]).expand(len(rows), -1)
        self._aside.write(name, rows, slot_RS, values_RS)

    def evict_one(
        self, row_N: Tensor, slot_N: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot (int64, on the device) of each of some rows (int64, on the host).

        sequences: whose dense form the slots are places in; here they are the same in any.

        The last slot of each such row moves into the gap. Raises CacheError for an empty row.
        """
        last_N = self.counts[row_N] - 1
        if bool((last_N < 0).any()):
            raise CacheError("evict_one needs at least one slot in every row: a row is empty.")
        if self._pool.lent:
            self._own_pages(row_N, (slot_N // self.page_slots).cpu())
        from_N = self._host_address(row_N, last_N).to(self.device)
        page_N = self._device_table[row_N.to(self.device), slot_N // self.page_slots].long()
        self._move(from_N, page_N * self.page_slots + slot_N % self.page_slots)
        if self._aside is not None:
            self._aside.move(row_N, last_N, slot_N)
        self._shorten(self.counts.index_copy(0, row_N, last_N))

    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; pages that lose nothing stay shared.

        Survivors are known by their positions; their volatile columns are renewed.
        """
        chosen, device = list(survivors.sequences), self.device
        position_BHS = self.dense(POSITION, chosen).long()
        kept_BHK = survivors.columns[POSITION].long()
        if not position_BHS.numel():
            return
        spare = max(int(position_BHS.max()), int(kept_BHK.max())) + 1  # stands for empty slots
        real_BHK = host.arange(kept_BHK.shape[2]) < survivors.counts_BH[..., None]
        kept_BHK = kept_BHK.where(real_BHK.to(device), spare)
        place_BHS = position_BHS.where(position_BHS != EMPTY, spare)
        width = (*kept_BHK.shape[:2], spare + 1)
        stays = torch.zeros(width, dtype=torch.bool, device=device).scatter_(2, kept_BHK, True)
        for name in self._volatile:
            by_position = torch.zeros(width, device=device, dtype=torch.float32)
            by_position.scatter_(2, kept_BHK, survivors.columns[name].float())
            self.write(name, by_position.gather(2, place_BHS), chosen)
        drops_RS = (~stays.gather(2, place_BHS) & (position_BHS != EMPTY)).flatten(0, 1).cpu()
        self._drop(self.row_index(chosen), drops_RS)

    def fill(self, groups: Sequence[Survivors], headroom: int = 0) -> None:
        """Replaces what some sequences hold, in exactly the pages that all rows then need.

        Sequences that stand in no group keep what they hold; none may stand in two. Every row gets
        room for `headroom` more slots. The old pool is freed before the new one is made.
        """
        listed = [b for group in groups for b in group.sequences]
        others = [b for b in range(self.sequences) if b not in listed]
        if len(listed) != len(set(listed)) or not set(listed) <= set(range(self.sequences)):
            raise CacheError(f"fill takes each of {self.sequences} sequences once, got {listed}.")
        if others:
            held = {name: self.dense(name, others) for name in self.columns}
            groups = [*groups, Survivors(tuple(others), held, self.counts_BH[others])]
        counts = torch.zeros_like(self.counts)
        for group in groups:
            counts[self.row_index(group.sequences)] = group.counts_BH.flatten()
        pages = self._pages_for(counts + headroom)
        pages[counts == 0] = 0
        self._owned, self._aside = pages, None
        self._pool.leave(self)
        self._join(PagePool(self.columns, self.page_slots, self.device, int(pages.sum())))
        self._set_counts(counts)
        first = pages.cumsum(0) - pages
        width = host.arange(int(pages.max()) if len(pages) else 0)
        table = torch.where(width < pages[:, None], first[:, None] + width, 0)
        self._set_table(table.to(torch.int32))
        for group in groups:
            self._fill_group(group, first)

    def select_sequences(self, index: Sequence[int]) -> PagedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages.

        This one stays as it is: both copy a page before they write to it.
        """
        if self._aside is None:
            self._aside = Aside({n: self.dense(n).flatten(0, 1) for n in self._volatile})
        chosen = copy.copy(self)
        rows = self.row_index(index)
        chosen._aside = self._aside.select(rows)
        chosen.sequences = len(index)
        chosen._owned = torch.minimum(self._owned, self._pages_for(self.counts))[rows]
        chosen._set_counts(self.counts[rows])
        chosen._set_table(self._table[rows, : int(chosen._owned.max()) if len(rows) else 0])
        chosen._join(self._pool)
        self._pool.lent, self._spare = True, 0
        return chosen

    def unshare(self, headroom: int = 0) -> None:
        """Gives every row pages of its own, side by side as after a prompt."""
        columns = {name: self.dense(name) for name in self.columns}
        everybody = tuple(range(self.sequences))
        self.fill([Survivors(everybody, columns, self.counts_BH)], headroom)

    def truncate(self, tokens: int) -> None:
        """Drops the last `tokens` slots of every row, and its pages that are then empty."""
        self._set_counts((self.counts - tokens).clamp_min(0))
        self._owned = torch.minimum(self._owned, self._pages_for(self.counts))
        self._set_table(self._table[:, : int(self._owned.max())])
        self._pool.trim()

    def trim(self) -> None:
        """Gives memory back if much of the pool is unused."""
        self._pool.trim()

    def pages_of_sequences(self) -> list[list[int]]:
        """The counts and pages of all rows of each sequence; equal ones hold the same slots."""
        pages_RW = self._table.long().masked_fill(~self._held_RW, -1)
        rows_RX = torch.cat([self.counts[:, None], pages_RW], dim=1)
        own = self._aside is None and not self._pool.lent  # then no page has two users
        return [
            [b] if own else rows.flatten().tolist()
            for b, rows in enumerate(rows_RX.view(self.sequences, -1))
        ]

    def renumber(self, place_P: Tensor) -> None:
        """Follows the pages to their new places in the pool."""
        self._set_table(self._renumbered(place_P))

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold, in as many pages as they need: tensors on the host."""
        live_N = torch.unique(self.owned_pages())
        place_P = host.zeros(self._pool.pages)
        place_P[live_N] = host.arange(len(live_N))
        pages = {
            f"page.{name}": self._pool.by_name[name].index_select(0, live_N.to(self.device)).cpu()
            for name in self.columns
        }
        aside = {} if self._aside is None else self._aside.columns
        beside = {f"aside.{name}": column.cpu().contiguous() for name, column in aside.items()}
        books = {
            "counts": self.counts.clone(),
            "table": self._renumbered(place_P),
            "owned": self._owned.clone(),
        }
        return {**books, **pages, **beside}

    def limit(self, pages: int) -> None:
        """Says that rows at their quotas never need more pages: the pool does not outgrow them."""
        self.most_pages = pages

    def load(self, state: Mapping[str, Tensor], layouts: Layouts | None = None) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        check_rows(state, self.columns, len(self.counts), self.page_slots, self._counters)
        pages = len(state[f"page.{next(iter(self.columns))}"])
        self._pool.leave(self)
        self._join(PagePool(self.columns, self.page_slots, self.device, pages))
        for name in self.columns:
            self._pool.by_name[name].copy_(state[f"page.{name}"])
        self._pool.lent = True  # rows may share pages
        self._owned = state["owned"].clone()
        self._set_counts(state["counts"].clone())
        self._set_table(state["table"].clone())
        aside = {n: state[f"aside.{n}"] for n in self._volatile if f"aside.{n}" in state}
        if aside:
            self._aside = Aside({n: x.to(self.device, copy=True) for n, x in aside.items()})

    @property
    def _counters(self) -> tuple[str, ...]:
        """The names of the tensors of `state` that have a number for every row."""
        return ("counts", "owned")

    def check_integrity(self) -> bool:
        """True if no page is lost or shared by rows that cannot share it, and every row fits.

        Raises CacheError otherwise.
        """
        members = list(self._pool.members)  # none of them may end meanwhile
        pages, free = self._pool.pages, self._pool.free_pages()
        used = set(torch.cat([store.owned_pages() for store in members]).tolist())
        if sorted([*used, *free]) != list(range(pages)):
            raise CacheError(
                f"{pages} pages, but {len(used)} in use and {len(free)} free do not add up."
            )
        pages_N, places_N = self.owned_pages().tolist(), self._places_RW[self._held_RW].tolist()
        if len(set(pages_N)) != len(set(zip(pages_N, places_N, strict=True))):
            raise CacheError("Rows of different heads, or different parts of rows, share a page.")
        if bool((self.counts > self._owned * self.page_slots).any()):
            raise CacheError("A row holds more slots than its pages have room for.")
        position_BHS = self.dense(POSITION).cpu()
        for row, count in zip(position_BHS.flatten(0, 1), self.held, strict=True):
            held = row[row != EMPTY]
            if len(held) != int(count) or len(held.unique()) != len(held):
                raise CacheError(f"A row of {int(count)} slots has the positions {held.tolist()}.")
        return True

    @property
    def held(self) -> Tensor:
        """Slots of every row that hold a token: int64 `[R]`, on the host."""
        return self.counts

    @property
    def _places_RW(self) -> Tensor:
        """A number for each page of each row: rows that share one must have it at the same."""
        head_R = host.arange(len(self.counts)) % self.heads
        return head_R[:, None] * 2**32 + host.arange(self._table.shape[1])

    def _drop(self, row_R: Tensor, drops_RS: Tensor) -> None:
        """Drops some slots (bool, on the host) of some rows; their last slots fill the gaps."""
        left_R = self.counts[row_R] - drops_RS.sum(1)
        slot_S = host.arange(drops_RS.shape[1])
        stays_RS = slot_S < left_R[:, None]
        gap_N = (drops_RS & stays_RS).nonzero()
        filler_N = (~drops_RS & ~stays_RS & (slot_S < self.counts[row_R, None])).nonzero()
        row_N, to_N, last_N = row_R[gap_N[:, 0]], gap_N[:, 1], filler_N[:, 1]
        if self._pool.lent:
            written = torch.unique(torch.stack([row_N, to_N // self.page_slots], dim=1), dim=0)
            self._own_pages(*written.unbind(1))
        addresses = (self._host_address(row_N, slot_N) for slot_N in (last_N, to_N))
        self._move(*(address_N.to(self.device) for address_N in addresses))
        if self._aside is not None:
            self._aside.move(row_N, last_N, to_N)
        self._shorten(self.counts.index_copy(0, row_R, left_R))

    def _move(self, from_N: Tensor, to_N: Tensor) -> None:
        """Copies slots to other addresses, in every column."""
        for name, column in self.columns.items():
            moved = ops.gather_slots(self._pool.by_name[name], from_N, column.slot_last)
            ops.scatter_slots(self._pool.by_name[name], to_N, moved, column.slot_last)

    def _shorten(self, counts: Tensor) -> None:
        """Sets smaller counts, and lets pages go that are then empty and may have other users."""
        self._set_counts(counts)
        if self._pool.lent:
            self._owned = torch.minimum(self._owned, self._pages_for(counts))

    def _scatter(self, name: str, address_N: Tensor, values: Tensor) -> None:
        """Writes values `[..., *shape]` of one column to the addresses, in the column's dtype."""
        column = self.columns[name]
        slots_NX = values.to(column.dtype).reshape(-1, *column.shape).contiguous()
        ops.scatter_slots(self._pool.by_name[name], address_N, slots_NX, column.slot_last)

    @property
    def _volatile(self) -> list[str]:
        return [name for name, column in self.columns.items() if column.volatile]

    def _write_pages(self, name: str, values_RS: Tensor, sequences: Sequence[int] | None) -> None:
        address_RS, held_RS = self.addresses(sequences)
        values_RS = values_RS[:, : address_RS.shape[1]]
        self._scatter(name, address_RS[held_RS], values_RS[held_RS])

    def _join(self, pool: PagePool) -> None:
        self._pool = pool
        pool.members.add(self)

    def _fill_group(self, group: Survivors, first_page_R: Tensor) -> None:
        rows = self.row_index(group.sequences)
        counts_R = group.counts_BH.flatten()
        slots = int(counts_R.max()) if len(counts_R) else 0
        slot_S = host.arange(slots)
        address_RS = (
            first_page_R[rows, None] * self.page_slots + slot_S
        )  # a row's pages are consecutive here
        held_RS = slot_S < counts_R[:, None]
        everything = bool(held_RS.all())
        address_N = (address_RS.flatten() if everything else address_RS[held_RS]).to(self.device)
        held_N = held_RS.flatten().to(self.device)
        for name, column in self.columns.items():
            shape = (len(group.sequences), self.heads, slots, *column.shape)
            absent = torch.zeros((), dtype=column.dtype, device=self.device).expand(shape)
            source = group.columns.get(name, absent)[:, :, :slots].detach()
            if not everything:
                source = source.reshape(-1, *column.shape)[held_N]
            self._scatter(name, address_N, source)

    @lasting
    def _reserve(self, counts: Tensor) -> None:
        """Gives every row the pages that `counts` slots need, and its own where it will write.

        Only the page of the next slot can have other users: where pages are shared, no row has any
        behind that.
        """
        if self._pool.lent:
            self._pool.trim()
            next_page = self.counts // self.page_slots
            row_N = ((counts > self.counts) & (next_page < self._owned)).nonzero().flatten()
            self._own_pages(row_N, next_page[row_N])
        missing = (self._pages_for(counts) - self._owned).clamp_min_(0)
        total = int(missing.sum())
        if total == 0:
            return
        fresh = self._pool.take(total, self.most_pages)
        width = max(self._table.shape[1], int((self._owned + missing).max()))
        table = host.zeros(len(counts), width, dtype=torch.int32)
        table[:, : self._table.shape[1]] = self._table
        for row in missing.nonzero().flatten().tolist():
            start, extra = int(self._owned[row]), int(missing[row])
            pages = [fresh.pop(0) for _ in range(extra)]
            table[row, start : start + extra] = host.tensor(pages, dtype=torch.int32)
        self._owned = self._owned + missing
        self._set_table(table)

    def _own_pages(self, row_N: Tensor, place_N: Tensor) -> None:
        """Copies those of some pages of rows that have other users; the last user keeps its own."""
        uses, table = self._pool.uses().tolist(), self._table.clone()
        shared = []
        pages = table[row_N, place_N].tolist()
        for row, place, page in zip(row_N.tolist(), place_N.tolist(), pages, strict=True):
            if uses[page] > 1:
                uses[page] -= 1
                shared.append((row, place, page))
        if not shared:
            return
        target = self._pool.take(len(shared), self.most_pages)
        self._pool.copy([page for _, _, page in shared], target)
        for (row, place, _), page in zip(shared, target, strict=True):
            table[row, place] = page
        self._set_table(table)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._join(self._pool)
