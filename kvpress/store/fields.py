"""What is kept of slots, read and written where pages and their overlay hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.store.base import POSITION, Survivors
from kvpress.store.overlay import Overlay
from kvpress.store.paging import Paging
from kvpress.types import EMPTY


class Fields:
    """The columns of slots in the pages of some rows.

    While pages are shared, the volatile columns are not read from them but from the overlay.
    """

    def __init__(self, paging: Paging, overlay: Overlay | None = None) -> None:
        self.paging, self.overlay = paging, overlay
        self.volatile = [name for name, column in paging.columns.items() if column.volatile]

    # Reading

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1 and zeros."""
        table, column = self.paging.table, self.paging.columns[name]
        address_RS, held_RS = table.addresses(sequences)
        batch = table.sequences if sequences is None else len(sequences)
        slots = address_RS.shape[1]
        if self.overlay is not None and name in self.overlay:
            values_RS = self.overlay.rows(name, table.row_index(sequences), slots)
            return values_RS.masked_fill(~held_RS, 0).view(batch, table.heads, slots)
        flat = ops.gather_slots(self.paging.pages(name), address_RS.flatten(), column.slot_last)
        empty = EMPTY if name == POSITION else 0
        flat.masked_fill_(~held_RS.flatten().view(-1, *[1] * len(column.shape)), empty)
        return flat.view(batch, table.heads, slots, *column.shape)

    def picked(self, name: str, sequences: Sequence[int], index_bHK: Tensor) -> Tensor:
        """Slots of a column that is not volatile, by their places in `dense`: `[b, H, K, ...]`."""
        table, column = self.paging.table, self.paging.columns[name]
        address_RS, _ = table.addresses(sequences)
        address_RK = address_RS.gather(1, index_bHK.flatten(0, 1))
        flat = ops.gather_slots(self.paging.pages(name), address_RK.flatten(), column.slot_last)
        return flat.view(*index_bHK.shape, *column.shape)

    # Writing; the pages must have no other users

    def scatter(self, name: str, address_A: Tensor, values: Tensor) -> None:
        """Writes values `[..., *shape]` of one column to the addresses, in the column's dtype."""
        column = self.paging.columns[name]
        slots_AX = values.to(column.dtype).reshape(-1, *column.shape).contiguous()
        ops.scatter_slots(self.paging.pages(name), address_A, slots_AX, column.slot_last)

    def put(self, row_R: Tensor, slot_RQ: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Writes slots (on the host) of some rows; columns that are not given become zero."""
        table = self.paging.table
        address_A = table.host_address(row_R[:, None], slot_RQ).flatten().to(table.device)
        for name, column in self.paging.columns.items():
            shape = (len(row_R) // table.heads, table.heads, slot_RQ.shape[1], *column.shape)
            absent = torch.zeros((), dtype=column.dtype, device=table.device)
            source = columns.get(name, absent).detach().expand(shape)
            if self.overlay is not None and name in self.overlay:
                self.overlay.write(name, row_R, slot_RQ, source.flatten(0, 1))
            else:
                self.scatter(name, address_A, source)

    def put_one(self, slot_R: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Writes one slot (on the host) of every row; columns that are not given become zero."""
        table = self.paging.table
        page_R1 = table.pages_RW.gather(1, (slot_R // table.page_slots)[:, None])
        address_R = page_R1.flatten() * table.page_slots + slot_R % table.page_slots
        address_R = address_R.to(table.device)
        for name, column in self.paging.columns.items():
            given = columns.get(name)
            if self.overlay is not None and name in self.overlay:
                values = address_R.new_zeros(len(slot_R), 1) if given is None else given
                row_R = host.arange(len(slot_R))
                self.overlay.write(name, row_R, slot_R[:, None], values.reshape(len(slot_R), 1))
            elif given is None:
                zeros = torch.zeros(len(slot_R), *column.shape, dtype=column.dtype, device="cpu")
                self.scatter(name, address_R, zeros.to(table.device))
            else:
                shape = (table.sequences, table.heads, 1, *column.shape)
                self.scatter(name, address_R, given.detach().expand(shape))

    def put_pages(self, row_A: Tensor, place_A: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Writes whole pages at some places of rows: each column `[N, *page_shape]`."""
        table = self.paging.table
        page_A = table.pages_RW[row_A, place_A].long()
        for name, column in self.paging.columns.items():
            if self.overlay is not None and name in self.overlay:
                slot_AS = place_A[:, None] * table.page_slots + host.arange(table.page_slots)
                self.overlay.write(name, row_A, slot_AS, columns[name])
            else:
                pages = self.paging.pages(name)
                pages.index_copy_(0, page_A.to(pages.device), columns[name].to(column.dtype))

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""
        values_RS = values_bHS.flatten(0, 1)
        if self.overlay is None:
            self._write_pages(name, values_RS, sequences)
            return
        rows = self.paging.table.row_index(sequences)
        slot_RS = host.arange(values_RS.shape[1]).expand(len(rows), -1)
        self.overlay.write(name, rows, slot_RS, values_RS)

    def _write_pages(self, name: str, values_RS: Tensor, sequences: Sequence[int] | None) -> None:
        address_RS, held_RS = self.paging.table.addresses(sequences)
        values_RS = values_RS[:, : address_RS.shape[1]]
        self.scatter(name, address_RS[held_RS], values_RS[held_RS])

    def move(self, row_A: Tensor, from_A: Tensor, to_A: Tensor, to_address_A: Tensor) -> None:
        """Copies one slot of each of some rows onto another one, in every column.

        row_A, from_A: on the host. to_A: a place in the row, where `to_address_A` is.
        """
        table = self.paging.table
        from_address_A = table.host_address(row_A, from_A).to(table.device)
        for name, column in self.paging.columns.items():
            pages = self.paging.pages(name)
            moved = ops.gather_slots(pages, from_address_A, column.slot_last)
            ops.scatter_slots(pages, to_address_A, moved, column.slot_last)
        if self.overlay is not None:
            self.overlay.move(row_A, from_A, to_A)

    def fill(self, groups: Sequence[Survivors], headroom: int) -> None:
        """Trades all pages for new ones that hold every sequence of some groups, no other.

        Every row gets room for `headroom` more slots.
        """
        table, self.overlay = self.paging.table, None
        counts = torch.zeros_like(table.counts)
        for group in groups:
            counts[table.row_index(group.sequences)] = group.counts_BH.flatten()
        first_R = self.paging.refill(counts, headroom)
        for group in groups:
            self._fill_group(group, first_R)

    def _fill_group(self, group: Survivors, first_page_R: Tensor) -> None:
        table, rows = self.paging.table, self.paging.table.row_index(group.sequences)
        counts_R = group.counts_BH.flatten()
        slots = int(counts_R.max()) if len(counts_R) else 0
        slot_S = host.arange(slots)
        # A row's pages are consecutive here: its slots are too.
        address_RS = first_page_R[rows, None] * table.page_slots + slot_S
        held_RS = slot_S < counts_R[:, None]
        everything = bool(held_RS.all())
        address_A = (address_RS.flatten() if everything else address_RS[held_RS]).to(table.device)
        held_A = held_RS.flatten().to(table.device)
        for name, column in self.paging.columns.items():
            shape = (len(group.sequences), table.heads, slots, *column.shape)
            absent = torch.zeros((), dtype=column.dtype, device=table.device).expand(shape)
            source = group.columns.get(name, absent)[:, :, :slots].detach()
            if not everything:
                source = source.reshape(-1, *column.shape)[held_A]
            self.scatter(name, address_A, source)

    def renew(self, survivors: Survivors, position_BHS: Tensor) -> Tensor:
        """Writes the volatile columns of survivors, which are known by their positions.

        position_BHS: of all slots of the survivors' sequences, not none. Returns which of them do
        not survive: bool `[R, S]`, on the host.
        """
        chosen, device = list(survivors.sequences), self.paging.table.device
        kept_BHK = survivors.columns[POSITION].long()
        spare = max(int(position_BHS.max()), int(kept_BHK.max())) + 1  # stands for empty slots
        real_BHK = host.arange(kept_BHK.shape[2]) < survivors.counts_BH[..., None]
        kept_BHK = kept_BHK.where(real_BHK.to(device), spare)
        place_BHS = position_BHS.where(position_BHS != EMPTY, spare)
        width = (*kept_BHK.shape[:2], spare + 1)  # a place for every position that there is
        stays = torch.zeros(width, dtype=torch.bool, device=device).scatter_(2, kept_BHK, True)
        for name in self.volatile:
            by_position = torch.zeros(width, device=device, dtype=torch.float32)
            by_position.scatter_(2, kept_BHK, survivors.columns[name].float())
            self.write(name, by_position.gather(2, place_BHS), chosen)
        return (~stays.gather(2, place_BHS) & (position_BHS != EMPTY)).flatten(0, 1).cpu()

    # Shared pages

    def share(self, index: Sequence[int]) -> Fields:
        """Those of rows whose sequence i has the pages of sequence `index[i]`."""
        if self.overlay is None:
            self.overlay = Overlay({n: self.dense(n).flatten(0, 1) for n in self.volatile})
        rows = self.paging.table.row_index(index)
        return Fields(self.paging.share(index), self.overlay.select(rows))

    def end_overlay(self) -> None:
        """Writes the volatile columns into the pages, which nobody shares any more."""
        if self.overlay is not None:
            overlay, self.overlay = self.overlay, None
            for name, column_RS in overlay.columns.items():
                self._write_pages(name, column_RS, None)

    # Files and checks

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold, in as many pages as they need: tensors on the host."""
        columns = {} if self.overlay is None else self.overlay.columns
        beside = {f"aside.{name}": column.cpu().contiguous() for name, column in columns.items()}
        return {**self.paging.state(), **beside}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        self.paging.load(state)
        device = self.paging.table.device
        beside = {n: state[f"aside.{n}"] for n in self.volatile if f"aside.{n}" in state}
        if beside:
            self.overlay = Overlay({n: x.to(device, copy=True) for n, x in beside.items()})


def check_positions(position_BHS: Tensor, held_R: Tensor) -> None:
    """Raises CacheError unless rows hold as many tokens as they count, each of them once."""
    for row, count in zip(position_BHS.cpu().flatten(0, 1), held_R, strict=True):
        held = row[row != EMPTY]
        if len(held) != int(count) or len(held.unique()) != len(held):
            raise CacheError(f"A row of {int(count)} slots has the positions {held.tolist()}.")
