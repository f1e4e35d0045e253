"""What a decode step wants to read of stored pages, and which of them it chooses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.ops import Always, Logits, Places, RowPages
from kvpress.ops.operands import new
from kvpress.store.base import BOX, CELL, LENGTH, PAGE, SPAN
from kvpress.store.packed import PackedRows

# What a head chose, and what is left of its attention, by what it depends on.
Memo: TypeAlias = dict[Hashable, tuple[Tensor, Tensor, Tensor]]


class Wanted(NamedTuple):
    """What a step asks of some sequences, None for all: who attends, and to which pages at most.

    slots: tokens that each row reads, at the most, pages that must be read apart. Always read are
    those with one of the first `sink` tokens of their sequence, or of the last `recent` ones of the
    `seen_b` (int64, on the device). cells, candidates, mass, top, tree: as `Retrieval` says.
    earlier_bND: queries of another step, by which pages are judged instead of those that attend.
    share_bHS: of attention that is expected at every token, by position: what pages are chosen by
    instead, but in rows where less than `sure` of it is read. memo: what it chose of equal pages.
    """

    query_bN1D: Tensor
    sequences: Sequence[int] | None
    logits: Logits
    need_weights: bool
    slots: Sequence[int]
    seen_b: Tensor
    sink: int = 0
    recent: int = 0
    cells: int = 0
    candidates: int | None = None
    mass: float | None = None
    top: int | None = None
    tree: bool = False
    earlier_bND: Tensor | None = None
    share_bHS: Tensor | None = None
    sure: float = 0.0
    memo: Memo | None = None

    @property
    def query_bND(self) -> Tensor:
        """By which pages are judged."""
        if self.earlier_bND is not None:
            return self.earlier_bND
        return self.query_bN1D[:, :, 0].contiguous()

    @property
    def sink_r(self) -> Tensor:
        """The first position of each row that need not be read: int64, on the device."""
        return self.seen_b.new_full((len(self.slots),), self.sink)

    @property
    def from_r(self) -> Tensor:
        """The first of the last positions that must be: int64, on the device."""
        return (self.seen_b - self.recent).repeat_interleave(len(self.slots) // len(self.seen_b))

    def always(self, part: PackedRows) -> Always:
        """Which pages of a part must be read."""
        return new(Always, (part.paging.pages(SPAN), self.sink_r, self.from_r))

    def by_now(self) -> Wanted:
        """The same with the queries that attend: what is missed is missed by them."""
        return self._replace(earlier_bND=None)

    def by_head(self, share_bHS: Tensor | None, sure: float, memo: Memo | None) -> Wanted:
        """The same, by what a head looks at."""
        return self._replace(share_bHS=share_bHS, sure=sure, memo=memo)

    def scanned(self) -> Wanted:
        """The same without a tree: all boxes are looked at."""
        return self._replace(tree=False)

    @property
    def at_once(self) -> bool:
        """Whether one operator does all of it: nothing but the output is asked for."""
        searches = self.tree or self.mass is not None or self.top is not None
        given = self.earlier_bND is not None or self.share_bHS is not None
        return not (searches or given or self.need_weights)

    def keep(self, recent: Sequence[int], page_slots: int) -> Tensor:
        """Whole pages that rows may read besides so many other slots: int64, on the device."""
        both = zip(self.slots, recent, strict=True)
        pages = [max(0, slots - own) // page_slots for slots, own in both]
        return host.tensor(pages).to(self.seen_b.device)

    def candidate(self, keep_r: Tensor) -> Tensor:
        """Pages of each row that are judged by cells where so many may be read.

        All of them where bounds are to be as tight as can be.
        """
        if self.candidates is None or self.mass is not None or self.top is not None:
            return torch.full_like(keep_r, torch.iinfo(keep_r.dtype).max)
        return keep_r * self.candidates


class Looked(NamedTuple):
    """Boxes of all rows, their bytes in each, and pages of each whose cells were looked at."""

    boxes: int
    box_bytes: int
    judged_r: Tensor | None = None  # int64
    cell_bytes: int = 0  # of a page

    @classmethod
    def at(cls, part: PackedRows, rows: int, boxes: int, judged_r: Tensor | None) -> Looked:
        """At boxes of a part, so many of all rows, and at cells, None: at none."""
        box_P2D = part.paging.pages(BOX)
        box = boxes * box_P2D.element_size() * 2 * box_P2D.shape[2] // max(1, rows)
        if judged_r is None:
            return cls(boxes, box)
        return cls(boxes, box, judged_r, part.paging.pages(CELL).shape[1])


class Bounds(NamedTuple):
    """The pages of some rows in one part, and how much each of them can matter.

    bound_bNW: fp32, no key of a page gives a larger product. rank_bNW: the same of the pages that
    may be chosen, −∞ elsewhere. boxes: that were looked at for this, of all rows. judged_r: pages
    of each row whose cells were: int64; None: none.
    """

    part: PackedRows
    number: int  # of the part, among those that have pages
    table_rW: Tensor  # int32
    pages_r: Tensor  # int64
    bound_bNW: Tensor
    rank_bNW: Tensor
    boxes: int
    judged_r: Tensor | None = None

    @property
    def rows(self) -> RowPages:
        """The pages, as operators take them."""
        return new(RowPages, (self.table_rW, self.pages_r))

    @property
    def slots(self) -> int:
        """Slots of a page."""
        return self.part.layout.slots

    @property
    def looked(self) -> Looked:
        """What was looked at for this."""
        return Looked.at(self.part, len(self.pages_r), self.boxes, self.judged_r)

    def judged(self, wanted: Wanted, candidates: Chosen) -> Bounds:
        """The same, of some pages by the cells of their keys: only those may be chosen then."""
        rank_bNW, bound_bNW = ops.score_cells(
            wanted.query_bND,
            self.part.paging.pages(BOX),
            self.part.paging.pages(CELL),
            self.rows,
            candidates.places,
            self.bound_bNW,
            wanted.cells,
            self.slots,
        )
        judged_r = candidates.pages_r
        return self._replace(rank_bNW=rank_bNW, bound_bNW=bound_bNW, judged_r=judged_r)

    def ranked(self, rank_bNW: Tensor) -> Bounds:
        """The same, of which others are chosen. N: query heads, or rows of a sequence."""
        return self._replace(rank_bNW=rank_bNW)

    def choose(self, wanted: Wanted, keep_r: Tensor) -> Chosen:
        """So many of the pages, or those that must be read."""
        always = wanted.always(self.part)
        chosen = ops.choose_pages(self.rank_bNW, self.rows, always, keep_r)
        return Chosen(self.part, self.number, *chosen)

    def missed(self, wanted: Wanted, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """ln Σ exp of the logits of the other pages, at the most `[b, N]`; their longest value."""
        mass_bN, length_r = ops.missed_mass(
            wanted.query_bND,
            self.bound_bNW,
            self.rows,
            chosen.places,
            self.part.paging.pages(LENGTH),
            wanted.logits,
            self.slots,
        )
        return mass_bN, length_r


def beside(part: PackedRows) -> list[Tensor]:
    """By what the operator `decode_chosen` judges pages; cells are any where there are none."""
    box_P2D, length_P2, span_P2 = (part.paging.pages(name) for name in (BOX, LENGTH, SPAN))
    return [box_P2D, length_P2, part.paging.pages(CELL if part.cells else PAGE), span_P2]


class Chosen(NamedTuple):
    """Pages of some rows in one part: their places in the rows, ascending, and how many."""

    part: PackedRows
    number: int
    place_rW: Tensor  # int32; −1 behind the last one
    pages_r: Tensor  # int64

    @property
    def places(self) -> Places:
        """The same, as operators take them."""
        return new(Places, (self.place_rW, self.pages_r))

    def counted(self) -> Chosen:
        """The same without the places."""
        return self._replace(place_rW=self.pages_r)

    def but(self, where_r: Tensor, other: Chosen) -> Chosen:
        """The same, of some rows (bool) what another choice has."""
        place_rW = torch.where(where_r[:, None], other.place_rW, self.place_rW)
        pages_r = torch.where(where_r, other.pages_r, self.pages_r)
        return self._replace(place_rW=place_rW, pages_r=pages_r)

    def narrow(self) -> Chosen:
        """The same in as few columns as can be, where that costs no wait."""
        if self.place_rW.device.type != "cpu" or not len(self.pages_r):
            return self
        width = int(self.pages_r.max())
        return self._replace(place_rW=self.place_rW[:, :width])


def rows_of(part: PackedRows, sequences: Sequence[int] | None) -> RowPages:
    """The pages that rows have in a part."""
    table_rW, counts_r = part.paging.table.operands(sequences)
    return new(RowPages, (table_rW, counts_r // part.layout.slots))


def scored(parts: Sequence[PackedRows], wanted: Wanted) -> list[Bounds]:
    """The bounds of all pages of some rows, by their boxes."""
    made = []
    for number, part in enumerate(parts):
        rows = rows_of(part, wanted.sequences)
        bound_bNW = ops.score_pages(wanted.query_bND, part.paging.pages(BOX), rows)
        made.append(Bounds(part, number, *rows, bound_bNW, bound_bNW, rows.table_RW.numel()))
    return made


def judged(bounds: Sequence[Bounds], wanted: Wanted, keeps: Sequence[Tensor]) -> list[Bounds]:
    """The same by the cells of keys, where they are kept, of pages that the boxes name.

    keeps: pages that each row may read.
    """
    if not wanted.cells:
        return list(bounds)
    most = [wanted.candidate(keep_r) for keep_r in keeps]
    both = zip(bounds, most, strict=True)
    return [own.judged(wanted, own.choose(wanted, most_r)) for own, most_r in both]


def spread(
    weights_bNQX: Tensor, chosen: Sequence[Chosen], widths: Sequence[int], spans: Sequence[int]
) -> Tensor:
    """Weights of chosen pages, then of recent slots, in the order of `dense`; 0 elsewhere.

    widths: dense slots of each part. spans: columns that its chosen pages have in the weights.
    """
    batch, heads, queries, _ = weights_bNQX.shape
    made, start = [], 0
    for own, width, span in zip(chosen, widths, spans, strict=True):
        size, rows = own.part.layout.slots, len(own.pages_r) // batch
        columns = own.place_rW.shape[1] * size
        short = weights_bNQX[..., start : start + columns]
        slot_S = torch.arange(size, device=short.device)
        # A page that is not there writes behind the last slot.
        place_rW = own.place_rW.long().where(own.place_rW >= 0, width // size)
        at_rX = (place_rW[..., None] * size + slot_S).flatten(1).clamp_max(width)
        at = at_rX.view(batch, rows, 1, columns).expand(-1, -1, heads // rows, -1)
        at = at.reshape(batch, heads, 1, columns).expand(short.shape)
        full = short.new_zeros(batch, heads, queries, width + 1)
        made.append(full.scatter_(3, at, short)[..., :width])
        start += span
    return torch.cat([*made, weights_bNQX[..., start:]], dim=-1)
