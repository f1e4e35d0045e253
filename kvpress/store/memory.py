"""What the pages of rows cost, and who else uses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from kvpress.store.fields import Fields


class PageMemory:
    """The memory of rows that all lie in one pool."""

    def __init__(self, fields: Fields) -> None:
        self._fields, self._paging = fields, fields.paging
        self._counted: tuple[tuple[object, ...], int] | None = None  # of which state, and how much

    @property
    def lock(self) -> threading.RLock:
        """To be held while the pages are used: forks may run in several threads."""
        return self._paging.pool.lock

    @property
    def shares(self) -> bool:
        """Whether some page of these rows has other users."""
        pool = self._paging.pool
        if not pool.lent and self._fields.overlay is None:
            return False
        pool.trim()
        shared = pool.lent and bool((pool.uses()[self._paging.owned_pages()] > 1).any())
        if not shared:
            self._fields.end_overlay()
        return shared

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive: pages, tables and counts.

        A pool of one store counts with its free pages, one that forks share as far as it is used.
        """
        if not self._alone or self._fields.overlay is not None:
            return self._count()
        # Every step of every layer asks this of all of them: it is counted again where it changed.
        pool, table = self._paging.pool, self._paging.table
        state = (pool.pages, table.pages_RW.numel(), table.counts.numel(), table.has_copy)
        if self._counted is None or self._counted[0] != state:
            self._counted = (state, self._count())
        return self._counted[1]

    def _count(self) -> int:
        tensors = list(self.tensors() if self._alone else self._beside())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        used = 0 if self._alone else self._used_pages
        return sum(storages.values()) + used * self._paging.slots_bytes

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores (forks) use as well."""
        if self._alone:
            return 0
        pool = self._paging.pool
        mine = torch.bincount(self._paging.owned_pages(), minlength=pool.pages)
        common = int(((mine > 0) & (pool.uses() > mine)).sum())
        return common * self._paging.slots_bytes

    @property
    def room(self) -> int:
        """Slots of the pages that these rows keep alive, empty ones included."""
        pages = self._paging.pool.pages if self._alone else self._used_pages
        return pages * self._paging.table.page_slots

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""
        return self._paging.table.row_bytes()

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept alive."""
        yield from self._paging.pool.tensors()
        yield from self._beside()

    def trim(self) -> None:
        """Gives memory back if much of the pool is unused."""
        self._paging.pool.trim()

    def pages_of_sequences(self) -> list[list[int]]:
        """The counts and pages of all rows of each sequence; equal ones hold the same slots."""
        table = self._paging.table
        pages_RW = table.pages_RW.long().masked_fill(~table.held_RW, -1)
        rows_RX = torch.cat([table.counts[:, None], pages_RW], dim=1)
        # Otherwise no page has two users.
        lent = self._fields.overlay is not None or self._paging.pool.lent
        return [
            rows.flatten().tolist() if lent else [b]
            for b, rows in enumerate(rows_RX.view(table.sequences, -1))
        ]

    @property
    def _alone(self) -> bool:
        return len(self._paging.pool.members) == 1

    @property
    def _used_pages(self) -> int:
        return len(torch.unique(self._paging.owned_pages()))

    def _beside(self) -> Iterator[Tensor]:
        """What is kept besides pages."""
        yield from self._paging.table.tensors()
        if self._fields.overlay is not None:
            yield from self._fields.overlay.columns.values()
