"""How rows are divided: pages of old slots, and slots behind them that stay as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import Column

_RECENT = 32  # at most so small a part of a row stays as it came
_HOLES = 8  # an eighth of the old slots of a row, or a page of them, may be holes


class Held(NamedTuple):
    """What some rows hold: int64 `[R]`, on the host."""

    recent: Tensor  # slots that are as they came
    old: Tensor  # slots in pages, holes included
    holes: Tensor  # slots of pages without a token
    format: Tensor  # the number of their layout

    @property
    def slots(self) -> Tensor:
        """Slots that hold a token."""
        return self.recent + self.old - self.holes


class Division(NamedTuple):
    """The rule by which rows are divided.

    residual: last slots that stay as they came, at most. page: slots of a page, of every format.
    fewest: of every format the slots for which a page is begun that they do not fill; as many as it
    holds, or more: none is. due: of every format the old slots that make it worth to pack pages.
    """

    residual: int
    page: tuple[int, ...]
    fewest: tuple[int, ...]
    due: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layouts: Sequence[PageLayout],
        residual: int,
        columns: dict[str, Column],
        ordered: bool,
        together: int = 1,
    ) -> Division:
        """The rule for rows of these columns. ordered: pages cannot have holes.

        together: at least so many slots are packed at once while tokens are decoded.
        """
        slot = sum(column.page_bytes(1) for column in columns.values())
        beside = slot - sum(column.page_bytes(1) for column in columns.values() if column.shape)
        page = tuple(layout.slots for layout in layouts)
        costs = [layout.page_bytes + layout.slots * beside for layout in layouts]
        # What stands in a page that is begun early is there to stay, while slots that wait are
        # packed in the end: of larger pages it must save half.
        gains = [1 if slots == min(page) else 2 for slots in page]
        fewest = [-(-gain * cost // slot) for gain, cost in zip(gains, costs, strict=True)]
        due = tuple(max(slots, together // slots * slots) for slots in page)
        return cls(residual, page, page if ordered else tuple(fewest), due)

    def residual_of(self, held: Held) -> Tensor:
        """Last slots of rows that stay as they came: int64 `[R]`."""
        return (held.slots // _RECENT).clamp_max(self.residual)

    def page_of(self, held: Held) -> Tensor:
        """Slots of a page of rows: int64 `[R]`."""
        return host.tensor(self.page)[held.format]

    def room(self, held: Held) -> Tensor:
        """Tokens that surely come before pages of a row are due: int64 `[R]`; 0: they are.

        A row that gets tokens may keep more of them as they came, never fewer.
        """
        due_R = host.tensor(self.due)[held.format]
        return (self.residual_of(held) + due_R - held.recent).clamp_min(0)

    def packed(self, held: Held, ended_R: Tensor) -> Tensor:
        """For how many slots rows get pages: int64 `[R]`, whole pages but for the last one.

        ended_R: where a prompt has ended, after which few tokens may come or many: only there a
        page is begun that is never filled.
        """
        page_R, fewest_R = self.page_of(held), host.tensor(self.fewest)[held.format]
        old_R = (held.recent - self.residual_of(held)).clamp_min(0)
        whole_R, rest_R = old_R // page_R, old_R % page_R
        holes_R = held.holes + page_R - rest_R
        few_R = holes_R <= most_holes(held.old + (whole_R + 1) * page_R, page_R)
        pages_R = whole_R + (ended_R & (rest_R >= fewest_R) & few_R)
        return torch.minimum(old_R, pages_R * page_R)


class Pages(NamedTuple):
    """Which slots of dense rows make which pages, each row's first slots first.

    row_A: the number of a page's row. slot_AS: its slots; a page that is not full repeats its last
    one, since what stands in holes must not change steps. real_AS: those that are not repeated.
    """

    row_A: Tensor
    slot_AS: Tensor
    real_AS: Tensor


def pages_of(first_R: Tensor, slots_R: Tensor, page: int) -> Pages:
    """The pages of rows of which so many slots are to be packed, from `first_R` on; on the host."""
    pages_R = -(-slots_R // page)
    row_A = host.arange(len(slots_R)).repeat_interleave(pages_R)
    # Entries of a row are neighbours: a search finds the first of them.
    place_A = host.arange(len(row_A)) - torch.searchsorted(row_A, row_A)
    slot_AS = place_A[:, None] * page + host.arange(page)
    last_A1 = slots_R[row_A, None] - 1
    return Pages(row_A, first_R[row_A, None] + slot_AS.minimum(last_A1), slot_AS <= last_A1)


def most_holes(slots_R: Tensor, page: int | Tensor) -> Tensor:
    """Holes that rows of so many old slots may have."""
    return (slots_R // _HOLES).clamp_min(page)
