"""Ragged rows in one pool of pages: the device tier, in model dtype.

Row r = b·H + h. Slot s of row r lies in page `table[r, s // page_slots]` at offset `s %
page_slots`. The order of slots inside a row is free: keys are stored rotated, at their own
positions, so that evicting one slot and appending a token is one overwrite. Counts and tables are
mirrored on the host and never read back from the device.
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
        self.columns = {**columns, POSITION: Column((), torch.int32)}
        self.counts = torch.zeros(sequences * heads, dtype=torch.int64)
        self._table = torch.zeros(sequences * heads, 0, dtype=torch.int32)
        self._device_table = self._table.to(device)
        self._owned = torch.zeros(sequences * heads, dtype=torch.int64)  # pages of each row
        self._free: list[int] = []
        self._pool = self._new_pool(0)

    # ---- what is stored
    # -------------------------------------------------------------------------------------

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

    def page_bytes(self) -> int:
        """Bytes of one page over all columns."""
        return self.page_slots * sum(column.slot_bytes for column in self.columns.values())

    def pool(self, name: str) -> Tensor:
        """The pages of one column, `[P, page_slots, ...]`, as operators read them."""
        return self._pool[name]

    def operands(self) -> tuple[Tensor, Tensor]:
        """The page table (int32 `[R, W]`) and the counts (int64 `[R]`) on the store's device."""
        return self._device_table, self.counts.to(self.device)

    def addresses(self) -> tuple[Tensor, Tensor]:
        """The flat address of every slot and whether it is occupied, `[R, S]`: int64 and bool."""
        slots = int(self.counts.max()) if self.counts.numel() else 0
        slot_S = torch.arange(slots, device=self.device)
        page_RS = self._device_table.long().index_select(1, slot_S // self.page_slots)
        held_RS = slot_S < self.counts.to(self.device)[:, None]
        return (page_RS * self.page_slots + slot_S % self.page_slots).masked_fill_(
            ~held_RS, 0
        ), held_RS

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1 and zeros."""
        address_RS, held_RS = self.addresses()
        if sequences is not None:
            rows = self._rows(sequences).to(self.device)
            width = int(self.counts_BH[list(sequences)].max()) if len(sequences) else 0
            address_RS, held_RS = address_RS[rows, :width], held_RS[rows, :width]
        flat = ops.gather_slots(self._pool[name], address_RS.flatten())
        empty = EMPTY if name == POSITION else 0
        flat.masked_fill_(~held_RS.flatten().view(-1, *[1] * len(self.columns[name].shape)), empty)
        batch = self.sequences if sequences is None else len(sequences)
        return flat.view(batch, self.heads, address_RS.shape[1], *self.columns[name].shape)

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

    # ---- changes
    # --------------------------------------------------------------------------------------------

    def append(self, columns: Mapping[str, Tensor], valid_BT: Tensor | None = None) -> None:
        """Adds tokens to the rows of their sequences: each column `[B, H, T, ...]`.

        valid_BT: host bool, False for padding, which is not stored. Columns that are not given
        start at zero.
        """
        tokens = columns[POSITION].shape[2]
        if valid_BT is None:
            valid_BT = torch.ones(self.sequences, tokens, dtype=torch.bool)
        valid_RT = valid_BT.repeat_interleave(self.heads, dim=0)
        slot_RT = self.counts[:, None] + valid_RT.cumsum(1) - 1
        counts = self.counts + valid_RT.sum(1)
        self._reserve(counts)
        row_RT = torch.arange(len(counts))[:, None].expand_as(slot_RT)
        slot_N, row_N = slot_RT[valid_RT], row_RT[valid_RT]
        address_N = self._table[row_N, slot_N // self.page_slots].long() * self.page_slots
        address_N = (address_N + slot_N % self.page_slots).to(self.device)
        everything = bool(valid_RT.all())
        for name, column in self.columns.items():
            flat = self._pool[name].flatten(0, 1)
            if name not in columns:
                flat.index_fill_(0, address_N, 0)
                continue
            source = columns[name].detach().to(column.dtype)
            source = source.expand(self.sequences, self.heads, tokens, *column.shape).reshape(
                -1, *column.shape
            )
            if not everything:
                source = source[valid_RT.flatten().to(self.device)]
            flat.index_copy_(0, address_N, source)
        self.counts = counts

    def write(self, name: str, values_BHS: Tensor) -> None:
        """Overwrites one column of every occupied slot from the form that `dense` gives it."""
        address_RS, held_RS = self.addresses()
        flat = self._pool[name].flatten(0, 1)
        values = values_BHS.reshape(address_RS.shape).to(flat.dtype)
        flat[address_RS[held_RS]] = values[held_RS]

    def evict_one(self, slot_R: Tensor, rows_R: Tensor) -> None:
        """Drops slot `slot_R` (int64, device) of the rows that `rows_R` (bool, host) chooses.

        The last slot of each such row moves into the gap. Raises CacheError for an empty row.
        """
        row_N = rows_R.nonzero().flatten()
        last_N = self.counts[row_N] - 1
        if bool((last_N < 0).any()):
            raise CacheError(
                "evict_one needs at least one slot in every chosen row: a row is empty."
            )
        from_N = (
            self._table[row_N, last_N // self.page_slots].long() * self.page_slots
            + last_N % self.page_slots
        )
        from_N, row_device_N = from_N.to(self.device), row_N.to(self.device)
        slot_N = slot_R.index_select(0, row_device_N)
        to_N = self._device_table[row_device_N, slot_N // self.page_slots].long() * self.page_slots
        to_N = to_N + slot_N % self.page_slots
        for pool in self._pool.values():
            flat = pool.flatten(0, 1)
            flat.index_copy_(0, to_N, flat.index_select(0, from_N))
        self.counts = self.counts.index_copy(0, row_N, last_N)

    def fill(self, groups: Sequence[Survivors], headroom: int = 0) -> None:
        """Replaces the contents, in exactly the pages that survivors and `headroom` slots need.

        Every sequence must stand in exactly one group. The old pool is freed first.
        """
        listed = sorted(b for group in groups for b in group.sequences)
        if listed != list(range(self.sequences)):
            raise CacheError(
                f"fill needs each of the {self.sequences} sequences once, got {listed}."
            )
        counts = torch.zeros_like(self.counts)
        for group in groups:
            counts[self._rows(group.sequences)] = group.counts_BH.flatten()
        self._pool.clear()
        pages = -(-(counts + headroom) // self.page_slots)
        pages[counts == 0] = 0
        self._pool = self._new_pool(int(pages.sum()))
        self._free, self._owned, self.counts = [], pages, counts
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

    # ---- pages
    # ----------------------------------------------------------------------------------------------

    def _rows(self, sequences: Sequence[int]) -> Tensor:
        start = torch.tensor(list(sequences), dtype=torch.int64)[:, None] * self.heads
        return (start + torch.arange(self.heads)).flatten()

    def _new_pool(self, pages: int) -> dict[str, Tensor]:
        shape = (pages, self.page_slots)
        return {
            name: torch.empty(*shape, *column.shape, dtype=column.dtype, device=self.device)
            for name, column in self.columns.items()
        }

    def _set_table(self, table_RW: Tensor) -> None:
        self._table = table_RW.contiguous()
        self._device_table = self._table.to(self.device)

    def _fill_group(self, group: Survivors, first_page_R: Tensor) -> None:
        rows = self._rows(group.sequences)
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
            flat = self._pool[name].flatten(0, 1)
            if name not in group.columns:
                flat.index_fill_(0, address_N, 0)
                continue
            source = (
                group.columns[name][:, :, :slots]
                .detach()
                .to(column.dtype)
                .reshape(-1, *column.shape)
            )
            flat.index_copy_(0, address_N, source if everything else source[held_N])

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
        new = old + max(pages, old // _GROWTH)
        for name, column in self.columns.items():
            pool = torch.empty(
                new, self.page_slots, *column.shape, dtype=column.dtype, device=self.device
            )
            pool[:old] = self._pool[name]
            self._pool[name] = pool
        self._free = list(range(new - 1, old - 1, -1)) + self._free
