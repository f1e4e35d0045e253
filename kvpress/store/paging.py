"""Who owns which page: a page table, the pool its pages are in, and copies on the first write.

Beams and forks share pages: a page with several users is copied before one of them writes to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.host import lasting
from kvpress.ops import Pages
from kvpress.ops.operands import new
from kvpress.store.base import KEY, VALUE, Column
from kvpress.store.saved import check_rows
from kvpress.store.table import PageTable
from kvpress.store.tiers.device import PagePool


class Paging:
    """The pages of some rows, in a pool that other rows may use too.

    columns: the fields of a slot. It registers with its pool, which asks it what is in use.
    """

    def __init__(
        self, columns: Mapping[str, Column], table: PageTable, pool: PagePool | None = None
    ) -> None:
        self.columns, self.table = dict(columns), table
        self.most_pages = 2**62  # the pool is never grown beyond what rows may come to need
        self.pool = self._new_pool(0) if pool is None else pool
        self.pool.members.add(self)

    def pages(self, name: str) -> Tensor:
        """The pages of one column, `[P, *page_shape]`, as operators read them."""
        return self.pool.by_name[name]

    def operands(self, sequences: Sequence[int] | None = None) -> Pages:
        """The keys and values of some rows, as operators take them."""
        pools = self.pool.by_name
        return new(Pages, (pools[KEY], pools[VALUE], *self.table.operands(sequences)))

    @property
    def slots_bytes(self) -> int:
        """Bytes of the slots of one page."""
        return sum(column.page_bytes(self.table.page_slots) for column in self.columns.values())

    def page_bytes(self) -> int:
        """Bytes that one more page costs: its slots and its entry in the page table."""
        return self.slots_bytes + self.table.entry_bytes()

    # As the pool asks

    def owned_pages(self) -> Tensor:
        """The pages in use, as often as rows hold them: int64, on the host."""
        return self.table.named_pages()

    def renumber(self, place_P: Tensor) -> None:
        """Follows the pages to their new places in the pool."""
        self.table.set_pages(self.table.renumbered(place_P))

    def reserve_one(self) -> None:
        """Makes room for one more slot in every row."""
        table = self.table
        if table.spare == 0:
            self.reserve(table.counts + 1)
            table.spare = int((table.owned * table.page_slots - table.counts).min())
        table.spare -= 1

    @lasting
    def reserve(self, counts: Tensor) -> None:
        """Gives every row the pages that `counts` slots need, and its own where it will write.

        Only the page of the next slot can have other users: where pages are shared, no row has any
        behind that.
        """
        table = self.table
        if self.pool.lent:
            self.pool.trim()
            next_page = table.counts // table.page_slots
            row_A = ((counts > table.counts) & (next_page < table.owned)).nonzero().flatten()
            self.own(row_A, next_page[row_A])
        missing = (table.pages_for(counts) - table.owned).clamp_min_(0)
        total = int(missing.sum())
        if total:
            fresh = host.tensor(self.pool.take(total, self.most_pages), dtype=torch.int32)
            _hand_out(table, fresh, missing)

    def own(self, row_A: Tensor, place_A: Tensor) -> None:
        """Copies those of some pages, by their places in rows, that have other users.

        The last user keeps its own. A page may be named once.
        """
        uses, pages_RW = self.pool.uses().tolist(), self.table.pages_RW.clone()
        shared = []
        pages = pages_RW[row_A, place_A].tolist()
        for row, place, page in zip(row_A.tolist(), place_A.tolist(), pages, strict=True):
            if uses[page] > 1:
                uses[page] -= 1
                shared.append((row, place, page))
        if not shared:
            return
        target = self.pool.take(len(shared), self.most_pages)
        self.pool.copy([page for _, _, page in shared], target)
        for (row, place, _), page in zip(shared, target, strict=True):
            pages_RW[row, place] = page
        self.table.set_pages(pages_RW)

    def own_slots(self, row_A: Tensor, slot_A: Tensor) -> None:
        """Makes some slots (on the host) safe to be written: their pages have no other users."""
        if self.pool.lent:
            both = torch.stack([row_A, slot_A // self.table.page_slots], dim=1)
            self.own(*torch.unique(both, dim=0).unbind(1))

    # After slots are gone

    def shorten(self, counts: Tensor) -> None:
        """Sets smaller counts, and lets pages go that are then empty and may have other users."""
        self.table.set_counts(counts)
        if self.pool.lent:
            self.table.let_go()

    def truncate(self, counts: Tensor) -> None:
        """Sets smaller counts, and gives back all pages that are then empty."""
        self.table.set_counts(counts)
        self.table.let_go()
        self.table.set_pages(self.table.pages_RW[:, : int(self.table.owned.max())])
        self.pool.trim()

    def refill(self, counts: Tensor, headroom: int) -> Tensor:
        """Trades all pages for new ones, for `counts` slots and `headroom` more in every row.

        The old pool is freed before the new one is made. Returns the first page of every row; the
        others follow it.
        """
        table = self.table
        pages = table.pages_for(counts + headroom)
        pages[counts == 0] = 0
        table.owned = pages
        self._move_to(int(pages.sum()))
        table.set_counts(counts)
        first = pages.cumsum(0) - pages
        width = host.arange(int(pages.max()) if len(pages) else 0)
        pages_RW = torch.where(width < pages[:, None], first[:, None] + width, 0)
        table.set_pages(pages_RW.to(torch.int32))
        return first

    def share(self, index: Sequence[int]) -> Paging:
        """One whose sequence i has the pages of sequence `index[i]`, in the same pool."""
        chosen = Paging(self.columns, self.table.select(index), self.pool)
        chosen.most_pages = self.most_pages
        self.pool.lent, self.table.spare = True, 0
        return chosen

    def move_out(self) -> None:
        """Leaves a pool that others use as well, for one with exactly the pages that rows hold."""
        if len(self.pool.members) == 1:
            return
        live_A, index_A, place_P = self._live()
        held = {name: self.pages(name).index_select(0, index_A) for name in self.columns}
        self._move_to(len(live_A))
        for name, pages in held.items():
            self.pages(name).copy_(pages)
        self.pool.lent = True  # rows may share pages
        self.table.set_pages(self.table.renumbered(place_P))

    def _live(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pages that rows hold, here and on the device, and where each comes to lie."""
        live_A = torch.unique(self.owned_pages())
        place_P = host.zeros(self.pool.pages)
        place_P[live_A] = host.arange(len(live_A))
        return live_A, live_A.to(self.table.device), place_P

    def _move_to(self, pages: int) -> None:
        """Leaves the pool for a new one of so many pages."""
        self.pool.leave(self)
        self.pool = self._new_pool(pages)
        self.pool.members.add(self)

    def _new_pool(self, pages: int) -> PagePool:
        return PagePool(self.columns, self.table.page_slots, self.table.device, pages)

    # Files and checks

    def state(self) -> dict[str, Tensor]:
        """The table and as many pages as it needs: tensors on the host."""
        _, index_A, place_P = self._live()
        pages = {
            f"page.{name}": self.pages(name).index_select(0, index_A).cpu() for name in self.columns
        }
        return {**self.table.state(place_P), **pages}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave. Raises CacheError if that cannot be."""
        table = self.table
        counters = ("counts", "owned", *table.further)
        check_rows(state, self.columns, len(table.counts), table.page_slots, counters)
        self._move_to(len(state[f"page.{next(iter(self.columns))}"]))
        for name in self.columns:
            self.pages(name).copy_(state[f"page.{name}"])
        self.pool.lent = True  # rows may share pages
        table.load(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pool.members.add(self)


def check_pages(paging: Paging, place_RW: Tensor) -> None:
    """Raises CacheError if a page is lost, rows share one that cannot, or slots do not fit.

    place_RW: a number for each page of each row: rows that share one must have it at the same.
    """
    members = list(paging.pool.members)  # none of them may end meanwhile
    pages, free = paging.pool.pages, paging.pool.free_pages()
    used = set(torch.cat([member.owned_pages() for member in members]).tolist())
    if sorted([*used, *free]) != list(range(pages)):
        raise CacheError(
            f"{pages} pages, but {len(used)} in use and {len(free)} free do not add up."
        )
    table = paging.table
    pages_A, places_A = paging.owned_pages().tolist(), place_RW[table.held_RW].tolist()
    if len(set(pages_A)) != len(set(zip(pages_A, places_A, strict=True))):
        raise CacheError("Rows of different heads, or different parts of rows, share a page.")
    if bool((table.counts > table.owned * table.page_slots).any()):
        raise CacheError("A row holds more slots than its pages have room for.")


def _hand_out(table: PageTable, fresh_A: Tensor, missing: Tensor) -> None:
    """Gives pages to rows: the first of them to the first row that misses some, and so on."""
    owned = table.owned + missing
    each, rows = len(fresh_A) // len(missing), table.pages_RW
    if bool((missing == each).all()) and bool((owned == rows.shape[1] + each).all()):
        # As mostly where rows are of one length: a few steps of one text must not cost more.
        pages_RW = torch.cat([rows, fresh_A.view(len(missing), each)], dim=1)
    else:
        wider = max(0, int(owned.max()) - rows.shape[1])
        pages_RW = torch.nn.functional.pad(rows, (0, wider))  # a copy, also by 0
        # Rows of unequal length need their pages in different steps: nothing here is done row
        # by row. Page a of the new ones, counted over all rows, stands behind those of its row.
        row_A = torch.repeat_interleave(missing)
        before_R = missing.cumsum(0) - missing
        place_A = host.arange(len(fresh_A)) + (table.owned - before_R)[row_A]
        pages_RW[row_A, place_A] = fresh_A
    table.owned = owned
    table.set_pages(pages_RW)
