"""Ragged rows in one pool of pages: the device tier, in model dtype.

Row r = b·H + h. Slot s of row r lies in page `table[r, s // page_slots]` at offset `s %
page_slots`. The order of slots inside a row is free: keys are stored rotated, at their own
positions, so that evicting one slot and appending a token is one overwrite. Counts and tables are
known to the host, which never reads them back from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import CacheError
from kvpress.store.base import POSITION, Column, Survivors
from kvpress.types import EMPTY

_GROWTH = 32  # a full pool grows by at least 1/32, so that appending costs amortised O(1) copies


class PagedRows:
    """The slots of one layer: `sequences × heads` rows of pages.

    Args: columns: the fields of a slot; `position` (int32) is added. page_slots: slots in a page.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        columns: Mapping[str, Column],
        page_slots: int,
        device: torch.device,
    ) -> None:
        self.sequences, self.heads, self.page_slots, self.device = (
            sequences,
            heads,
            page_slots,
            device,
        )
        self.on_host = device.type == "cpu"
        self.columns = {**columns, POSITION: Column((), torch.int32)}
        self.counts = torch.zeros(sequences * heads, dtype=torch.int64)
        self._table = torch.zeros(sequences * heads, 0, dtype=torch.int32)
        self._device_table = self._table.to(device)
        self._device_counts: Tensor | None = None  # a copy of `counts`, unless it is outdated
        self._owned = torch.zeros(sequences * heads, dtype=torch.int64)  # pages of each row
        self._spare = 0  # tokens that surely fit into every row
        self._free: list[int] = []
        self.most_pages = 2**62  # the pool is never grown beyond what rows may come to need
        self._pool = self._new_pool(0)

    @property
    def counts_BH(self) -> Tensor:
        """Slots of every row, on the host: int64 `[B, H]`."""
        return self.counts.view(self.sequences, self.heads)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive: pools with their free pages, tables and counts."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()
        }
        return sum(storages.values())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the store owns."""
        yield from self._pool.values()
        yield from (self.counts, self._table, self._device_table, self._owned)
        if self._device_counts is not None:
            yield self._device_counts

    def page_bytes(self) -> int:
        """Bytes that one more page costs: its slots and its entry in the page table."""
        copies = 1 if self.on_host else 2  # the host mirrors the device's table
        entries = self._table.element_size() * copies
        return self.page_slots * sum(c.slot_bytes for c in self.columns.values()) + entries

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""
        copies = 1 if self.on_host else 2
        return self.counts.element_size() * copies + self._owned.element_size()

    def pool(self, name: str) -> Tensor:
        """The pages of one column, `[P, *page_shape]`, as operators read them."""
        return self._pool[name]

    def operands(self, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Page table (int32 `[R, W]`) and counts (int64 `[R]`) of some rows, on the device."""
        if sequences is None:
            return self._device_table, self.device_counts
        row_R = self.row_index(sequences)
        return self._device_table[row_R.to(self.device)], self.counts[row_R].to(self.device)

    @property
    def device_counts(self) -> Tensor:
        """The counts of all rows where the operators are: `counts` itself on the CPU."""
        if self.on_host:
            return self.counts
        if self._device_counts is None:
            self._device_counts = self.counts.to(self.device)
        return self._device_counts

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

    def addresses(self, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The flat address of every slot and whether it is occupied, `[R, S]`: int64 and bool.

        S is the largest count of the sequences. Unoccupied slots have the address 0.
        """
        table_RW, counts_R = self.operands(sequences)
        host_R = self.counts if sequences is None else self.counts[self.row_index(sequences)]
        slots = int(host_R.max()) if host_R.numel() else 0
        slot_S = torch.arange(slots, device=self.device)
        page_RS = table_RW.long().index_select(1, slot_S // self.page_slots)
        held_RS = slot_S < counts_R[:, None]
        address_RS = page_RS * self.page_slots + slot_S % self.page_slots
        return address_RS.masked_fill_(~held_RS, 0), held_RS

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1 and zeros."""
        address_RS, held_RS = self.addresses(sequences)
        shape, slot_last = self.columns[name].shape, self.columns[name].slot_last
        flat = ops.gather_slots(self._pool[name], address_RS.flatten(), slot_last)
        empty = EMPTY if name == POSITION else 0
        flat.masked_fill_(~held_RS.flatten().view(-1, *[1] * len(shape)), empty)
        batch = self.sequences if sequences is None else len(sequences)
        return flat.view(batch, self.heads, address_RS.shape[1], *shape)

    def dense_by_position(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """All columns of some sequences, dense: each row by position, its empty slots first."""
        position_bHS = self.dense(POSITION, sequences)
        order_bHS = position_bHS.argsort(dim=-1, stable=True)
        columns = {}
        for name, column in self.columns.items():
            values = self.dense(name, sequences)
            index = order_bHS.view(*order_bHS.shape, *[1] * len(column.shape))
            columns[name] = values.gather(2, index.expand(*order_bHS.shape, *column.shape))
        return columns

    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`.

        Columns that are not given start at zero.
        """
        chosen = range(self.sequences) if sequences is None else sequences
        row_R, tokens = self.row_index(chosen), columns[POSITION].shape[2]
        slot_RT = self.counts[row_R, None] + torch.arange(tokens)
        counts = self.counts.index_add(0, row_R, torch.full_like(row_R, tokens))
        self._reserve(counts)
        address_N = self._host_address(row_R[:, None], slot_RT).flatten().to(self.device)
        for name, column in self.columns.items():
            shape = (len(chosen), self.heads, tokens, *column.shape)
            source = columns.get(name, torch.zeros((), device=self.device)).detach().expand(shape)
            self._scatter(name, address_N, source)
        self._set_counts(counts)

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites one column of every occupied slot from the form that `dense` gives it."""
        address_RS, held_RS = self.addresses(sequences)
        self._scatter(name, address_RS[held_RS], values_bHS.reshape(address_RS.shape)[held_RS])

    def evict_one(self, row_N: Tensor, slot_N: Tensor) -> None:
        """Drops one slot (int64, on the device) of each of some rows (int64, on the host).

        The last slot of each such row moves into the gap. Raises CacheError for an empty row.
        """
        last_N = self.counts[row_N] - 1
        if bool((last_N < 0).any()):
            raise CacheError("evict_one needs at least one slot in every row: a row is empty.")
        from_N = self._host_address(row_N, last_N).to(self.device)
        page_N = self._device_table[row_N.to(self.device), slot_N // self.page_slots].long()
        to_N = page_N * self.page_slots + slot_N % self.page_slots
        for name, column in self.columns.items():
            moved = ops.gather_slots(self._pool[name], from_N, column.slot_last)
            ops.scatter_slots(self._pool[name], to_N, moved, column.slot_last)
        self._set_counts(self.counts.index_copy(0, row_N, last_N))

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
        self._pool.clear()
        pages = -(-(counts + headroom) // self.page_slots)
        pages[counts == 0] = 0
        self._pool = self._new_pool(int(pages.sum()))
        self._free, self._owned = [], pages
        self._set_counts(counts)
        first = pages.cumsum(0) - pages
        width = torch.arange(int(pages.max()) if len(pages) else 0)
        table = torch.where(width < pages[:, None], first[:, None] + width, 0)
        self._set_table(table.to(torch.int32))
        for group in groups:
            self._fill_group(group, first)

    def select_sequences(self, index: Sequence[int], headroom: int = 0) -> PagedRows:
        """A new store whose sequence i is a copy of sequence `index[i]` of this one."""
        columns = {n: c for n, c in self.columns.items() if n != POSITION}
        chosen = PagedRows(len(index), self.heads, columns, self.page_slots, self.device)
        kept = {name: self.dense(name, index) for name in self.columns}
        counts = self.counts_BH[list(index)]
        chosen.fill([Survivors(tuple(range(len(index))), kept, counts)], headroom)
        return chosen

    def check_integrity(self) -> bool:
        """True if every page has exactly one owner and every row fits its pages.

        Raises CacheError otherwise.
        """
        pages = self._pool[POSITION].shape[0]
        owned = [
            int(p) for row, n in zip(self._table, self._owned, strict=True) for p in row[: int(n)]
        ]
        if sorted(owned + self._free) != list(range(pages)):
            raise CacheError(
                f"{pages} pages, but {len(owned)} owned and {len(self._free)} free do not add up."
            )
        if bool((self.counts > self._owned * self.page_slots).any()):
            raise CacheError("A row holds more slots than its pages have room for.")
        position_BHS = self.dense(POSITION).cpu()
        for row, count in zip(position_BHS.flatten(0, 1), self.counts, strict=True):
            held = row[row != EMPTY]
            if len(held) != int(count) or len(held.unique()) != len(held):
                raise CacheError(f"A row of {int(count)} slots has the positions {held.tolist()}.")
        return True

    def row_index(self, sequences: Sequence[int]) -> Tensor:
        """The rows of some sequences: int64, on the host."""
        start = torch.tensor(list(sequences), dtype=torch.int64)[:, None] * self.heads
        return (start + torch.arange(self.heads)).flatten()

    def _host_address(self, row: Tensor, slot: Tensor) -> Tensor:
        """Flat addresses from rows and slots that the host knows."""
        page = self._table[row, slot // self.page_slots].long()
        return page * self.page_slots + slot % self.page_slots

    def _scatter(self, name: str, address_N: Tensor, values: Tensor) -> None:
        """Writes values `[..., *shape]` of one column to the addresses, in the column's dtype."""
        column = self.columns[name]
        slots_NX = values.to(column.dtype).reshape(-1, *column.shape).contiguous()
        ops.scatter_slots(self._pool[name], address_N, slots_NX, column.slot_last)

    def _new_pool(self, pages: int) -> dict[str, Tensor]:
        return {name: self._new_pages(name, pages) for name in self.columns}

    def _new_pages(self, name: str, pages: int) -> Tensor:
        column = self.columns[name]
        shape = (pages, *column.page_shape(self.page_slots))
        return torch.empty(shape, dtype=column.dtype, device=self.device)

    def _set_counts(self, counts: Tensor) -> None:
        self.counts, self._device_counts, self._spare = counts, None, 0

    def _set_table(self, table_RW: Tensor) -> None:
        self._table = table_RW.contiguous()
        self._device_table = self._table.to(self.device)

    def _fill_group(self, group: Survivors, first_page_R: Tensor) -> None:
        rows = self.row_index(group.sequences)
        counts_R = group.counts_BH.flatten()
        slots = int(counts_R.max()) if len(counts_R) else 0
        slot_S = torch.arange(slots)
        address_RS = (
            first_page_R[rows, None] * self.page_slots + slot_S
        )  # a row's pages are consecutive here
        held_RS = slot_S < counts_R[:, None]
        everything = bool(held_RS.all())
        address_N = (address_RS.flatten() if everything else address_RS[held_RS]).to(self.device)
        held_N = held_RS.flatten().to(self.device)
        for name, column in self.columns.items():
            shape = (len(group.sequences), self.heads, slots, *column.shape)
            absent = torch.zeros((), device=self.device).expand(shape)
            source = group.columns.get(name, absent)[:, :, :slots].detach()
            if not everything:
                source = source.reshape(-1, *column.shape)[held_N]
            self._scatter(name, address_N, source)

    def _reserve(self, counts: Tensor) -> None:
        """Gives every row the pages that `counts` slots need."""
        missing = (-(-counts // self.page_slots) - self._owned).clamp_min_(0)
        total = int(missing.sum())
        if total == 0:
            return
        if total > len(self._free):
            self._grow(total - len(self._free))
        width = int((self._owned + missing).max())
        table = torch.zeros(len(counts), width, dtype=torch.int32)
        table[:, : self._table.shape[1]] = self._table
        for row in missing.nonzero().flatten().tolist():
            start, extra = int(self._owned[row]), int(missing[row])
            pages = [self._free.pop() for _ in range(extra)]
            table[row, start : start + extra] = torch.tensor(pages, dtype=torch.int32)
        self._owned = self._owned + missing
        self._set_table(table)

    def _grow(self, pages: int) -> None:
        """Enlarges the pool by at least `pages` free pages, one column at a time."""
        old = self._pool[POSITION].shape[0]
        spare = min(old // _GROWTH, self.most_pages - old)
        new = old + max(pages, spare)
        for name in self.columns:
            pool = self._new_pages(name, new)
            pool[:old] = self._pool[name]
            self._pool[name] = pool
        self._free = list(range(new - 1, old - 1, -1)) + self._free
