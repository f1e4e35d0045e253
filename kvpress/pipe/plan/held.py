"""Bytes that a cache will hold: the functions by which the store counts, asked without slots."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpress import host
from kvpress.formulas.page_layout import PageLayout
from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.state.stores import Stores
from kvpress.policy.budget import Budget, Geometry, Limits
from kvpress.policy.formats import SHORT, format_of, guards
from kvpress.policy.recipe import Newest, Recipe, recalled
from kvpress.store.base import KEY, VALUE
from kvpress.store.division import Division, Held, most_holes
from kvpress.store.packed import PackedRows
from kvpress.store.paged import PagedRows
from kvpress.store.tiered import ref_columns
from kvpress.store.tiers.device import enlarged
from kvpress.types import LayerKind

_CPU = host.zeros(0).device


class Bytes(NamedTuple):
    """Bytes of a cache. pages: that tiers may move. beside: that are on the device in any case.

    waiting: that rows may hold for a while besides, until slots of them are packed.
    """

    pages: int = 0
    beside: int = 0
    waiting: int = 0

    @property
    def held(self) -> int:
        """What the ledger counts."""
        return self.pages + self.beside

    def plus(self, other: Bytes) -> Bytes:
        """The sum."""
        return Bytes(*(a + b for a, b in zip(self, other, strict=True)))


def cache_bytes(
    shape: Shape, recipe: Recipe, texts: Texts, chunk: int, tiered: bool = False
) -> Bytes:
    """Bytes of all layers once such texts were read, in chunks, and decoded."""
    total = Bytes()
    known: dict[tuple[Any, ...], Bytes] = {}
    for kind in shape.kinds:
        # Layers that are alike hold as much: of hundreds of them few are counted.
        rule = recipe.stage("retrieve").retrieve(kind.index)
        like = (kind.heads, kind.queries, kind.width, kind.window, rule)
        if like not in known:
            known[like] = _Layer(shape, recipe, kind, tiered).bytes(texts, chunk)
        total = total.plus(known[like])
    return total


class _Layer:
    """A layer that holds nothing yet."""

    def __init__(self, shape: Shape, recipe: Recipe, kind: LayerKind, tiered: bool) -> None:
        limits, rule = recipe.limits, recipe.stage("retrieve").retrieve(kind.index)
        if kind.window is not None:
            keep, tiered, rule = kind.window - 1, False, None
            recipe = Recipe((Newest(),))
            limits = Limits(Budget.parse(keep), recent=keep)
        self._kind, self._tiered, self._recipe, self._limits = kind, tiered, recipe, limits
        stored, slots, width = shape.stored, shape.page_slots, kind.width or 1
        self._stores = Stores(recipe, limits, slots, stored, kind.index, retrieval=rule)
        self._columns = self._stores.columns(stored, width, width)
        page = self._stores.recent_page(tiered)
        self._recent = PagedRows(1, kind.heads, self._columns, page, _CPU)
        self._layers = len(shape.tiered) if kind.window is None else 1
        self._query = (kind.queries or kind.heads) * width * shape.dtype.itemsize  # bytes of one

    def bytes(self, texts: Texts, chunk: int) -> Bytes:
        """What all rows hold, and the last queries where they are kept."""
        kept = texts.batch * min(texts.length, recalled(self._recipe))
        return self._slots_of(texts, chunk).plus(Bytes(beside=kept * self._query))

    def _slots_of(self, texts: Texts, chunk: int) -> Bytes:
        first, last = self._slots(texts)
        rows = texts.batch * self._kind.heads
        if not (self._stores.packs or self._tiered):
            return Bytes(beside=self._paged(rows, texts, chunk, first, last))
        drops = self._limits is not None and (chunk < texts.prompt or self._limits.interval > 0)
        return self._packed(rows, first, last, drops)

    def _slots(self, texts: Texts) -> tuple[int, int]:
        """Slots of a row after its prompt, and in the end, at the most."""
        limits = self._limits
        if limits is None or self._recipe.defers or self._recipe.shares:
            return texts.prompt, texts.length  # such prompts are held whole for a while
        shape = self._geometry(limits)
        quota, more = limits.quota(texts.prompt, shape).slots, limits.interval
        first = min(texts.prompt, quota)
        if not more:
            return first, first + texts.new
        if limits.grows:
            quota = limits.quota(texts.length, shape).slots
        return first, min(first + texts.new, max(first, quota + more))

    def _geometry(self, limits: Limits) -> Geometry:
        return Geometry(
            self._layers,
            self._kind.heads,
            self._recent.page_slots,
            self._recent.paging.page_bytes(),
            self._recent.memory.row_bytes(),
            limits.interval,
        )

    def _paged(self, rows: int, texts: Texts, chunk: int, first: int, last: int) -> int:
        """Bytes of rows that are stored as they came, in a pool that grew."""
        size, room = self._recent.page_slots, self._stores.room
        # Rows of unequal budgets hold up to a page more each than equal ones would.
        uneven = size - 1 if self._recipe.uneven else 0
        evicts = first < texts.prompt
        start = first if evicts else min(chunk, first)
        pool = pages = rows * _pages(start + room + uneven, size)
        for slots in [*range(start + chunk, first, chunk), *range(first, last, size), last]:
            needed = rows * _pages(slots + uneven, size)
            pages = max(pages, needed)
            if pages > pool:
                pool = enlarged(pool, pages - pool)
        return self._in_pages(self._recent, rows, pool)

    def _packed(self, rows: int, first: int, last: int, drops: bool) -> Bytes:
        """Bytes of rows whose old slots are in pages of their own, of the widest layout.

        drops: whether slots may go whose pages stay: they are then counted with the most holes.
        """
        widths = (self._columns[KEY].shape[0], self._columns[VALUE].shape[0])
        layouts = self._stores.layouts(
            widths, self._stores.kept(widths), self._columns[KEY].dtype.itemsize
        )
        together = self._stores.together if self._tiered else 1
        given = (layouts, self._recipe.residual, self._recent.columns, self._stores.ordered)
        division = Division.of(*given, together)
        found = [_divided(division, number, first, last) for number in self._formats(last)]
        made = []
        for number, old, recent in found:
            layout, due = layouts[number], division.due[number]
            holes = most_holes(host.tensor([old]), layout.slots) if drops and old else 0
            made.append(self._of(layout, rows, old + int(holes), recent, due))
        return max(made, key=lambda own: own.held)

    def _formats(self, slots: int) -> list[int]:
        """The numbers of the layouts that rows of so many slots may get."""
        short = host.tensor([self._stores.has_short_rows and slots < SHORT])
        packing = self._recipe.packing
        kinds = [host.tensor([wide]) for wide in (False, True)[: 1 + guards(packing)]]
        return [int(format_of(packing, wide, short)) for wide in kinds]

    def _of(self, layout: PageLayout, rows: int, old: int, recent: int, due: int) -> Bytes:
        like = self._recent.paging.pages(KEY).new_empty(0)
        volatile = {n: column for n, column in self._recent.columns.items() if column.volatile}
        ordered = self._stores.ordered
        part = PackedRows(1, self._kind.heads, layout, volatile, like, ordered, self._stores.cells)
        pages = rows * _pages(old, layout.slots)
        size = self._recent.page_slots
        beside = self._in_pages(self._recent, rows, rows * _pages(recent, size))
        # The kept channels of every row, and what was decided of it.
        beside += rows * (2 * (layout.key_kept + layout.value_kept) + 3)
        whole = self._in_pages(part, rows, pages)
        moved = pages * layout.page_bytes if self._tiered else 0
        references = sum(c.page_bytes(1) for c in ref_columns().values()) if self._tiered else 0
        slot = sum(column.page_bytes(1) for column in self._recent.columns.values())
        return Bytes(moved, beside + whole - moved + pages * references, rows * (due + size) * slot)

    def _in_pages(self, rows: PagedRows | PackedRows, count: int, pages: int) -> int:
        """Bytes of so many rows that have these pages."""
        return count * rows.memory.row_bytes() + pages * rows.paging.page_bytes()


def _pages(slots: int, size: int) -> int:
    return -(-slots // size)


def _divided(division: Division, number: int, first: int, last: int) -> tuple[int, int, int]:
    """Old and recent slots of a row after its prompt and after it was decoded, by its format."""

    def held(recent: int, old: int) -> Held:
        return Held(*(host.tensor([x]) for x in (recent, old, 0, number)))

    ended, goes_on = host.tensor([True]), host.tensor([False])
    old = int(division.packed(held(first, 0), ended))
    recent = first - old
    while recent < last - old:
        room = int(division.room(held(recent, old)))
        recent += min(max(1, room), last - old - recent)
        if not int(division.room(held(recent, old))):
            packed = int(division.packed(held(recent, old), goes_on))
            old, recent = old + packed, recent - packed
    return number, old, recent
