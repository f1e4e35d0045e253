"""What rows cost whose pages may be in any tier."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.base import REF
from kvpress.store.fields import Fields
from kvpress.store.memory import PageMemory
from kvpress.store.paging import Paging
from kvpress.store.table import PageTable
from kvpress.store.tiers.shelf import Shelf


class Used(NamedTuple):
    """The pages with slots of some rows, as their table names them: once for each row.

    All int64, on the host. It holds as long as the table has these pages and counts.
    """

    pages_RW: Tensor
    counts: Tensor
    row_A: Tensor
    place_A: Tensor
    page_A: Tensor
    id_A: Tensor  # their numbers on the shelf

    @classmethod
    def of(cls, paging: Paging) -> Used:
        """The pages that rows have now."""
        table = paging.table
        place_W = host.arange(table.pages_RW.shape[1])  # what is behind pages with slots is room
        used_RW = place_W < (table.counts // table.page_slots)[:, None]
        row_A, place_A = used_RW.nonzero().unbind(1)
        page_A = table.pages_RW[row_A, place_A].long()
        id_A = paging.pages(REF)[page_A]
        return cls(table.pages_RW, table.counts, row_A, place_A, page_A, id_A)

    def holds(self, table: PageTable) -> bool:
        """Whether the table still has the same pages."""
        return self.pages_RW is table.pages_RW and self.counts is table.counts


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
        return self._shelf.tier_bytes(torch.unique(Used.of(self._paging).id_A))
