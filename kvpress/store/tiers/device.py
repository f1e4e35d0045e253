"""Pages of one layer, which rows of one cache or of several share copy-on-write."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.base import Column

_GROWTH = 32  # a full pool grows by at least 1/32, so that appending costs amortised O(1) copies
_LEAST_USED = 0.75  # of the pages; a pool that is used less is packed


def enlarged(pages: int, missing: int, most: int = 2**62) -> int:
    """Pages of a pool of so many once some that were missing have come; see `PagePool.take`."""
    return pages + max(missing, min(pages // _GROWTH, most - pages))


class PageUser(Protocol):
    """Who has a part in a pool, as rows do."""

    def owned_pages(self) -> Tensor:
        """The pages in use, once for each row that holds them: int64 `[A]`, on the host."""

    def renumber(self, place_P: Tensor) -> None:
        """Follows the pages to their new places, `place_P[page]`."""


class PagePool:
    """The storages of pages, and which of them are free.

    A page belongs to every row whose table names it. Nothing counts these rows: `uses` asks the
    stores that are alive, so that a cache that is dropped cannot leak its pages.
    """

    def __init__(
        self, columns: Mapping[str, Column], page_slots: int, device: torch.device, pages: int
    ) -> None:
        self._columns, self._page_slots, self._device = columns, page_slots, device
        self.pages = pages
        self.by_name = {name: self._new(name, pages) for name in columns}
        self._free: list[int] = []
        self.members: WeakSet[PageUser] = WeakSet()
        self.lent = False  # whether pages may have several users, or none that is alive
        self.lock = threading.RLock()  # forks of a cache may run in several threads

    def tensors(self) -> Iterator[Tensor]:
        """The storages, one per column."""
        yield from self.by_name.values()

    def uses(self) -> Tensor:
        """How many rows hold each page: int64 `[P]`, on the host."""
        held = [store.owned_pages() for store in self.members]
        return torch.bincount(torch.cat(held), minlength=self.pages) if held else self._none_used()

    def take(self, pages: int, most: int) -> list[int]:
        """Free pages for one user. The pool grows if it must, to little more than `most` pages."""
        if pages > len(self._free) and self.lent:
            self.sweep()
        if pages > len(self._free):
            self._grow(pages - len(self._free), most)
        return [self._free.pop() for _ in range(pages)]

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copies whole pages."""
        to, start = host.tensor(target), host.tensor(source)
        for pool in self.by_name.values():
            copied = pool.index_select(0, start.to(pool.device))
            pool.index_copy_(0, to.to(pool.device), copied)

    def leave(self, store: PageUser) -> None:
        """Ends the part that a store has in this pool, and frees what nobody needs any more."""
        self.members.discard(store)
        self.lent = True
        if self.members:
            self.trim()
        else:
            self.by_name.clear()

    def trim(self) -> None:
        """Frees what nobody uses; packs the pages that are left if that is much of the memory."""
        live_P = self.sweep() > 0
        kept = int(live_P.sum())
        if kept > _LEAST_USED * self.pages:
            return
        index = live_P.nonzero().flatten()
        for name, pool in self.by_name.items():
            self.by_name[name] = pool.index_select(0, index.to(pool.device))
        self.pages, self._free = kept, []
        place_P = live_P.cumsum(0) - 1
        for store in self.members:
            store.renumber(place_P)

    def free_pages(self) -> list[int]:
        """The pages that nobody uses."""
        if self.lent:
            self.sweep()
        return self._free

    def sweep(self) -> Tensor:
        """Finds the pages that nobody uses any more. Returns the `uses` of all."""
        uses_P = self.uses()
        self._free = (uses_P == 0).nonzero().flatten().flip(0).tolist()
        self.lent = len(self.members) > 1 or bool((uses_P > 1).any())
        return uses_P

    def _none_used(self) -> Tensor:
        return host.zeros(self.pages)

    def _new(self, name: str, pages: int) -> Tensor:
        column = self._columns[name]
        shape = (pages, *column.page_shape(self._page_slots))
        device = "cpu" if column.on_host else self._device
        return torch.empty(shape, dtype=column.dtype, device=device)

    def _grow(self, pages: int, most: int) -> None:
        """Enlarges the pool by at least `pages` free pages, one column at a time."""
        old, new = self.pages, enlarged(self.pages, pages, most)
        for name in self.by_name:
            pool = self._new(name, new)
            pool[:old] = self.by_name[name]
            self.by_name[name] = pool
        self.pages = new
        self._free = list(range(new - 1, old - 1, -1)) + self._free

    def __getstate__(self) -> dict[str, Any]:
        return {n: x for n, x in vars(self).items() if n not in ("lock", "members")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock, self.members = threading.RLock(), WeakSet()  # copied stores join by themselves
