"""Where the slots of ragged rows are: page tables and counts, on the host and on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.host import lasting


class PageTable:
    """The pages of each row, in order, and how many slots each row holds.

    Row r = b·H + h. Slot s of row r lies in page `table[r, s // page_slots]` at offset `s %
    page_slots`. The host knows all of this and never reads it back from the device.
    """

    def __init__(self, sequences: int, heads: int, page_slots: int, device: torch.device) -> None:
        self.sequences, self.heads = sequences, heads
        self.page_slots, self.device, self.on_host = page_slots, device, device.type == "cpu"
        self.counts = host.zeros(sequences * heads)
        self._table = host.zeros(sequences * heads, 0, dtype=torch.int32)
        self._device_table = self._table.to(device)
        self._device_counts: Tensor | None = None  # a copy of `counts`, unless it is outdated
        self._owned = host.zeros(sequences * heads)  # pages of each row
        self._spare = 0  # tokens that surely fit into every row's own pages

    @property
    def counts_BH(self) -> Tensor:
        """Slots of every row, on the host: int64 `[B, H]`."""
        return self.counts.view(self.sequences, self.heads)

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""
        copies = 1 if self.on_host else 2
        return self.counts.element_size() * copies + self._owned.element_size()

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
            self._device_counts = self._copied_counts()
        return self._device_counts

    @lasting
    def _copied_counts(self) -> Tensor:
        return self.counts.to(self.device)

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

    def owned_pages(self) -> Tensor:
        """The pages of all rows, as often as rows hold them: int64, on the host."""
        return self._table[self._held_RW].long()

    def row_index(self, sequences: Sequence[int]) -> Tensor:
        """The rows of some sequences: int64, on the host."""
        start = host.tensor(list(sequences))[:, None] * self.heads
        return (start + host.arange(self.heads)).flatten()

    def _books(self) -> Iterator[Tensor]:
        """The tensors of the table itself."""
        yield from (self.counts, self._table, self._device_table, self._owned)
        if self._device_counts is not None:
            yield self._device_counts

    def _host_address(self, row: Tensor, slot: Tensor) -> Tensor:
        """Flat addresses from rows and slots that the host knows."""
        page = self._table[row, slot // self.page_slots].long()
        return page * self.page_slots + slot % self.page_slots

    @property
    def _held_RW(self) -> Tensor:
        """Which entries of the page table name a page."""
        return host.arange(self._table.shape[1]) < self._owned[:, None]

    def _renumbered(self, place_P: Tensor) -> Tensor:
        """The page table with the page p called `place_P[p]`."""
        table, held_RW = torch.zeros_like(self._table), self._held_RW
        table[held_RW] = place_P[self._table[held_RW].long()].int()
        return table

    def _pages_for(self, counts: Tensor) -> Tensor:
        return -(-counts // self.page_slots)

    def _set_counts(self, counts: Tensor) -> None:
        self.counts, self._device_counts, self._spare = counts, None, 0

    def _set_table(self, table_RW: Tensor) -> None:
        self._table = table_RW.contiguous()
        self._device_table = self._table.to(self.device)
