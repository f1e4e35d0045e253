"""Ragged rows in one pool of pages: the device tier, in model dtype.

The order of slots inside a row is free: keys are stored rotated, at their own positions, so that
evicting one slot and appending a token is one overwrite.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.ops import Logits
from kvpress.store.base import POSITION, Column, Survivors
from kvpress.store.fields import Fields, check_positions
from kvpress.store.memory import PageMemory
from kvpress.store.paging import Paging, check_pages
from kvpress.store.rows import Layouts, Rows
from kvpress.store.table import PageTable


class PagedRows(Rows):
    """Rows whose slots are all stored alike.

    Args: columns: the fields of a slot; `position` (int32) is added. page_slots: slots in a page.
    """

    memory: PageMemory

    def __init__(
        self,
        sequences: int,
        heads: int,
        columns: Mapping[str, Column],
        page_slots: int,
        device: torch.device,
    ) -> None:
        columns = {**columns, POSITION: Column((), torch.int32)}
        table = PageTable(sequences, heads, page_slots, device)
        self.heads, self.page_slots = heads, page_slots
        self.device, self.on_host, self.columns = device, table.on_host, columns
        self.paging, self.sequences = Paging(columns, table), sequences
        self.fields = Fields(self.paging)
        self.memory = PageMemory(self.fields)

    @property
    def counts(self) -> Tensor:
        """Slots of every row: int64 `[R]`, on the host."""
        return self.paging.table.counts

    def limit(self, pages: int) -> None:
        """Says that rows at their quotas never need more pages: the pool does not outgrow them."""
        self.paging.most_pages = pages

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and LSE of new queries, and weights in the order of `dense` where asked for."""
        pages = self.paging.operands(sequences)
        out_bNQE, lse_bNQ, weights = ops.decode_rows(query_bNQD, pages, logits, need_weights)
        return out_bNQE, lse_bNQ, weights if need_weights else None

    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did to the counts on the device.

        One token came to every row; rows above `quota_R` lost one slot. everywhere: all rows did.
        """
        self.paging.table.count_step(quota_R, everywhere)

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1 and zeros."""
        return self.fields.dense(name, sequences)

    def picked(self, name: str, sequences: Sequence[int], index_bHK: Tensor) -> Tensor:
        """Some slots of one column, `[b, H, K, ...]`, by their places; no others are read."""
        return self.fields.picked(name, sequences, index_bHK)

    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`.

        Columns that are not given start at zero.
        """
        table, tokens = self.paging.table, columns[POSITION].shape[2]
        if tokens == 1 and (sequences is None or list(sequences) == [*range(self.sequences)]):
            self._append_one(columns)
            return
        row_R = table.row_index(sequences)
        slot_RQ = table.counts[row_R, None] + host.arange(tokens)
        counts = table.counts.index_add(0, row_R, torch.full_like(row_R, tokens))
        self.paging.reserve(counts)
        self.fields.put(row_R, slot_RQ, columns)
        table.set_counts(counts)

    def _append_one(self, columns: Mapping[str, Tensor]) -> None:
        """The same of one token to every row: in as few steps as can be, for each decoded token."""
        table = self.paging.table
        self.paging.reserve_one()
        self.fields.put_one(table.counts, columns)
        spare = table.spare  # that was found for the next tokens too
        table.set_counts(table.counts + 1)
        table.spare = spare

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""
        self.fields.write(name, values_bHS, sequences)

    def evict_one(
        self, row_A: Tensor, slot_A: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot (int64, on the device) of each of some rows (int64, on the host).

        sequences: whose dense form the slots are places in; here they are the same in any.

        The last slot of each such row moves into the gap. Raises CacheError for an empty row.
        """
        table = self.paging.table
        last_A = table.counts[row_A] - 1
        if bool((last_A < 0).any()):
            raise CacheError("evict_one needs at least one slot in every row: a row is empty.")
        if self.paging.pool.lent:
            self.paging.own(row_A, (slot_A // self.page_slots).cpu())
        self.fields.move(row_A, last_A, slot_A, table.device_address(row_A, slot_A))
        self.paging.shorten(table.counts.index_copy(0, row_A, last_A))

    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; pages that lose nothing stay shared.

        Survivors are known by their positions; their volatile columns are renewed.
        """
        position_BHS = self.dense(POSITION, survivors.sequences).long()
        if position_BHS.numel():
            drops_RS = self.fields.renew(survivors, position_BHS)
            self._drop(self.paging.table.row_index(survivors.sequences), drops_RS)

    def _drop(self, row_R: Tensor, drops_RS: Tensor) -> None:
        """Drops some slots (bool, on the host) of some rows; their last slots fill the gaps."""
        table = self.paging.table
        left_R = table.counts[row_R] - drops_RS.sum(1)
        slot_S = host.arange(drops_RS.shape[1])
        # Of the places that stay, those that are dropped are gaps; of the places behind them, those
        # that are kept are fillers. A row has as many of the one as of the other.
        stays_RS = slot_S < left_R[:, None]
        gap_A = (drops_RS & stays_RS).nonzero()
        filler_A = (~drops_RS & ~stays_RS & (slot_S < table.counts[row_R, None])).nonzero()
        row_A, to_A, last_A = row_R[gap_A[:, 0]], gap_A[:, 1], filler_A[:, 1]
        self.paging.own_slots(row_A, to_A)
        to_address_A = table.host_address(row_A, to_A).to(self.device)
        self.fields.move(row_A, last_A, to_A, to_address_A)
        self.paging.shorten(table.counts.index_copy(0, row_R, left_R))

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
        self.fields.fill(groups, headroom)

    def truncate(self, tokens: int) -> None:
        """Drops the last `tokens` slots of every row, and its pages that are then empty."""
        self.paging.truncate((self.counts - tokens).clamp_min(0))

    def select_sequences(self, index: Sequence[int]) -> PagedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages.

        This one stays as it is: both copy a page before they write to it.
        """
        chosen = copy.copy(self)
        chosen.fields, chosen.sequences = self.fields.share(index), len(index)
        chosen.paging, chosen.memory = chosen.fields.paging, PageMemory(chosen.fields)
        return chosen

    def unshare(self, headroom: int = 0) -> None:
        """Gives every row pages of its own, side by side as after a prompt."""
        columns = {name: self.dense(name) for name in self.columns}
        everybody = tuple(range(self.sequences))
        self.fill([Survivors(everybody, columns, self.counts_BH)], headroom)

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold, in as many pages as they need: tensors on the host."""
        return self.fields.state()

    def load(self, state: Mapping[str, Tensor], layouts: Layouts | None = None) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        self.fields.load(state)

    def check_integrity(self) -> bool:
        """True if no page is lost or shared by rows that cannot share it, and every row fits.

        Raises CacheError otherwise.
        """
        table = self.paging.table
        place_W = host.arange(table.pages_RW.shape[1])
        check_pages(self.paging, table.head_R[:, None] * 2**32 + place_W)
        check_positions(self.dense(POSITION), self.counts)
        return True
