"""What rows cost whose pages may be in any tier."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.base import REF
from kvpress.store.fields import Fields
from kvpress.store.memory import PageMemory
from kvpress.store.paging import Paging
from kvpress.store.table import PageTable
from kvpress.store.tiers.shelf import Shelf


def used_pages(table: PageTable) -> Tensor:
    """Which entries of a table name a page with slots: bool `[R, W]`; the others are room."""
    width = table.pages_RW.shape[1]
    return host.arange(width) < (table.counts // table.page_slots)[:, None]


def ids_of(paging: Paging) -> Tensor:
    """The numbers on the shelf of all pages with slots, once for each row: int64, on the host."""
    table = paging.table
    return paging.pages(REF)[table.pages_RW[used_pages(table)].long()]


class TieredMemory(PageMemory):
    """The memory of such rows: what is beside pages, and their bytes in whatever tier."""

    def __init__(self, fields: Fields, shelf: Shelf) -> None:
        super().__init__(fields)
        self._shelf = shelf

    @property
    def lock(self) -> threading.RLock:
        """That of all rows of the engine: they share what is on its way."""
        return self._shelf.tiers.lock

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive, with those of pages in all tiers."""
        return super().nbytes + sum(self.tier_bytes().values())

    @property
    def beside(self) -> int:
        """Bytes besides those of pages."""
        return super().nbytes

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores (forks) use as well."""
        beside = self._paging.slots_bytes
        return super().nbytes_shared // beside * (beside + self._shelf.page_bytes)

    def tier_bytes(self) -> dict[str, int]:
        """Bytes of pages in each tier."""
        return self._shelf.tier_bytes(torch.unique(ids_of(self._paging)))
