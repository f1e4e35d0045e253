"""Where the slots of ragged rows are: page tables and counts, on the host and on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.host import lasting


class PageTable:
    """The pages of each row, in order, and how many slots each row holds.

    Row r = b·H + h. Slot s of row r lies in page `pages_RW[r, s // page_slots]` at offset `s %
    page_slots`. The host knows all of this and never reads it back from the device.

    counters: names of further numbers that are kept of every row.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        page_slots: int,
        device: torch.device,
        counters: Sequence[str] = (),
    ) -> None:
        rows = sequences * heads
        self.sequences, self.heads = sequences, heads
        self.page_slots, self.device, self.on_host = page_slots, device, device.type == "cpu"
        self.counts = host.zeros(rows)
        self.owned = host.zeros(rows)  # pages of each row
        self.further = {name: host.zeros(rows) for name in counters}
        self.pages_RW = host.zeros(rows, 0, dtype=torch.int32)
        self.spare = 0  # tokens that surely fit into every row's own pages
        self._device_pages = self.pages_RW.to(device)
        self._device_counts: Tensor | None = None  # a copy of `counts`, unless it is outdated

    @property
    def counts_BH(self) -> Tensor:
        """Slots of every row, on the host: int64 `[B, H]`."""
        return self.counts.view(self.sequences, self.heads)

    @property
    def held_RW(self) -> Tensor:
        """Which entries of the page table name a page."""
        return host.arange(self.pages_RW.shape[1]) < self.owned[:, None]

    @property
    def head_R(self) -> Tensor:
        """The head of every row."""
        return host.arange(len(self.counts)) % self.heads

    @property
    def has_copy(self) -> bool:
        """Whether the device has a copy of the counts."""
        return self._device_counts is not None

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

    def operands(self, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Page table (int32 `[R, W]`) and counts (int64 `[R]`) of some rows, on the device."""
        if sequences is None:
            return self._device_pages, self.device_counts
        row_R = self.row_index(sequences)
        return self._device_pages[row_R.to(self.device)], self.counts[row_R].to(self.device)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the table keeps alive."""
        yield from (self.counts, self.pages_RW, self._device_pages, self.owned)
        yield from self.further.values()
        if self._device_counts is not None:
            yield self._device_counts

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""
        copies = 1 if self.on_host else 2
        once = (self.owned, *self.further.values())
        return self.counts.element_size() * copies + sum(x.element_size() for x in once)

    def entry_bytes(self) -> int:
        """Bytes that a page costs in this table."""
        copies = 1 if self.on_host else 2  # the host mirrors the device's table
        return self.pages_RW.element_size() * copies

    # Where slots are

    def row_index(self, sequences: Sequence[int] | None) -> Tensor:
        """The rows of some sequences, or of all: int64, on the host."""
        chosen = range(self.sequences) if sequences is None else sequences
        start = host.tensor(list(chosen))[:, None] * self.heads  # rows are sequence-major
        return (start + host.arange(self.heads)).flatten()

    def addresses(self, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The flat address of every slot and whether it is occupied, `[R, S]`: int64 and bool.

        S is the largest count of the sequences. Unoccupied slots have the address 0.
        """
        table_RW, counts_R = self.operands(sequences)
        host_R = self.counts if sequences is None else self.counts[self.row_index(sequences)]
        slots = int(host_R.max()) if host_R.numel() else 0
        slot_S = torch.arange(slots, device=self.device)
        # Slot s is the (s mod page_slots)-th of the row's page number s // page_slots; with pages
        # side by side in the pool, that is this flat address.
        page_RS = table_RW.long().index_select(1, slot_S // self.page_slots)
        held_RS = slot_S < counts_R[:, None]
        address_RS = page_RS * self.page_slots + slot_S % self.page_slots
        return address_RS.masked_fill_(~held_RS, 0), held_RS

    def host_address(self, row: Tensor, slot: Tensor) -> Tensor:
        """Flat addresses from rows and slots that the host knows; on the host."""
        page = self.pages_RW[row, slot // self.page_slots].long()
        return page * self.page_slots + slot % self.page_slots

    def device_address(self, row_A: Tensor, slot_A: Tensor) -> Tensor:
        """The same from slots that only the device knows, so that nothing waits for it."""
        page_A = self._device_pages[row_A.to(self.device), slot_A // self.page_slots].long()
        return page_A * self.page_slots + slot_A % self.page_slots

    def named_pages(self) -> Tensor:
        """The pages of all rows, as often as rows hold them: int64, on the host."""
        return self.pages_RW[self.held_RW].long()

    def pages_for(self, counts: Tensor) -> Tensor:
        """How many pages so many slots need."""
        return -(-counts // self.page_slots)  # rounded up

    def renumbered(self, place_P: Tensor) -> Tensor:
        """The page table with the page p called `place_P[p]`."""
        table, held_RW = torch.zeros_like(self.pages_RW), self.held_RW
        table[held_RW] = place_P[self.pages_RW[held_RW].long()].int()
        return table

    # What changes

    def set_counts(self, counts: Tensor) -> None:
        """Says how many slots rows hold."""
        self.counts, self._device_counts, self.spare = counts, None, 0

    def set_pages(self, table_RW: Tensor) -> None:
        """Says which pages rows have."""
        self.pages_RW = table_RW.contiguous()
        self._device_pages = self.pages_RW.to(self.device)

    def let_go(self) -> None:
        """Takes pages without slots from their rows."""
        self.owned = torch.minimum(self.owned, self.pages_for(self.counts))

    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did to the counts on the device.

        One token came to every row; rows above `quota_R` lost one slot. everywhere: all rows did.
        """
        if everywhere:
            self.spare += 1
        if not self.on_host:  # there the operator changed `counts` itself
            counts = self.counts + 1
            self.counts = counts if quota_R is None else counts - (counts > quota_R).long()

    def select(self, index: Sequence[int]) -> PageTable:
        """A table whose sequence i has the pages of sequence `index[i]`, none beyond its slots."""
        rows = self.row_index(index)
        chosen = PageTable(
            len(index), self.heads, self.page_slots, self.device, tuple(self.further)
        )
        chosen.owned = torch.minimum(self.owned, self.pages_for(self.counts))[rows]
        chosen.further = {name: counter_R[rows] for name, counter_R in self.further.items()}
        chosen.set_counts(self.counts[rows])
        chosen.set_pages(self.pages_RW[rows, : int(chosen.owned.max()) if len(rows) else 0])
        return chosen

    def state(self, place_P: Tensor) -> dict[str, Tensor]:
        """Copies of all numbers, with the page p called `place_P[p]`."""
        counters = {"counts": self.counts, "owned": self.owned, **self.further}
        copies = {name: counter_R.clone() for name, counter_R in counters.items()}
        return {**copies, "table": self.renumbered(place_P)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.owned = state["owned"].clone()
        self.further = {name: state[name].clone() for name in self.further}
        self.set_counts(state["counts"].clone())
        self.set_pages(state["table"].clone())
