"""The pages that a step chose of some rows: brought to the device, and as one call takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.ops import Old
from kvpress.store.base import POSITION, REF
from kvpress.store.chosen import Chosen
from kvpress.store.moves import Moves
from kvpress.store.steps import Brought
from kvpress.store.tiered import TieredPages
from kvpress.store.tiers.arena import HALVES
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.units import Units, unit_pages, units_of


class Picked(NamedTuple):
    """Pages of some rows in one part, and where they are for as long as the step lasts."""

    rows: TieredPages
    sequences: Sequence[int] | None
    chosen: Chosen
    id_rW: Tensor  # their numbers on the shelf, on the host; NOWHERE behind the last one
    at_rW: Tensor  # where they are on the device; NOWHERE where they are not
    brought: Brought

    @property
    def at_P(self) -> Tensor:
        """Where all pages of the shelf are."""
        at_P, held_rW = self.rows.shelf.directory.at_P.clone(), self.id_rW != NOWHERE
        at_P[self.id_rW[held_rW]] = self.at_rW[held_rW]
        return at_P

    def units(self) -> Units:
        """The same in units, which can be read part by part."""
        return units_of(self.rows, self.sequences, (self.chosen.place_rW, self.chosen.pages_r))

    def operands(self) -> list[Tensor] | None:
        """The same as an operator takes them; None where one call cannot take all of them.

        With as many columns as units have: what chunks there are does not depend on where pages
        are.
        """
        rows = self.rows
        if POSITION in rows.paging.columns or not self.brought.whole:
            return None
        more = -self.at_rW.shape[1] % unit_pages(rows.layout)
        table_rW = torch.nn.functional.pad(self.at_rW.clamp_min(0).int(), (0, more))
        table_rW = table_rW.to(rows.like.device)
        counts_r = self.chosen.pages_r * rows.layout.slots
        channels = (rows.key_channels_RC, rows.value_channels_RU)
        if self.sequences is not None:
            channels = rows.channels(rows.paging.table.row_index(self.sequences))
        none = rows.like.new_empty(0, dtype=torch.float32)
        return [rows.shelf.pages, *channels, table_rW, counts_r, none.int(), none, none.long()]


def pick(some: Sequence[Chosen], sequences: Sequence[int] | None) -> list[Picked]:
    """Brings what was chosen to the device, as far as it finds room. Raises TierError."""
    picked = []
    for number, own in enumerate(some):
        rows, id_rW = _named(own, sequences)
        held_rW = id_rW != NOWHERE
        brought = rows.bring(id_rW[held_rW], number < HALVES)
        at_rW = torch.full_like(id_rW, NOWHERE).masked_scatter_(held_rW, brought.at_A)
        picked.append(Picked(rows, sequences, own, id_rW, at_rW, brought))
    return picked


def moved(picks: Sequence[Sequence[Picked]]) -> Moves:
    """What all picks of a step had to load, and what the last one has of the step before."""
    made = [own.brought.moves for picked in picks for own in picked]
    made += [own.rows.steps.compare(own.sequences, own.id_rW) for own in picks[-1]] if picks else []
    return Moves(*(sum(counts) for counts in zip(*made, strict=True)))


def named(
    some: Sequence[Chosen], sequences: Sequence[int] | None
) -> list[tuple[TieredPages, Tensor]]:
    """The numbers of chosen pages on their shelves: int64 `[A]`, on the host."""
    found = (_named(own, sequences) for own in some)
    return [(rows, id_rW[id_rW != NOWHERE]) for rows, id_rW in found]


def _named(own: Chosen, sequences: Sequence[int] | None) -> tuple[TieredPages, Tensor]:
    """The numbers of chosen pages on their shelf: NOWHERE behind the last one."""
    rows = own.part
    assert isinstance(rows, TieredPages), "all old slots of rows that stream are in tiers"
    table = rows.paging.table
    page_RW = table.pages_RW
    if sequences is not None:
        page_RW = page_RW[table.row_index(sequences)]
    place_rW = own.place_rW.cpu()
    page_rW = page_RW.gather(1, place_rW.long().clamp_min(0)).long()
    return rows, rows.paging.pages(REF)[page_rW].where(place_rW >= 0, NOWHERE)


def old_of(picked: Sequence[Picked]) -> Old | None:
    """All of it as one operator call takes it; None where that cannot be."""
    tensors: list[Tensor] = []
    layouts: list[int] = []
    for own in picked:
        if own.id_rW.shape[1]:
            found = own.operands()
            if found is None:
                return None
            tensors += found
            layouts += own.rows.layout
    return Old(tensors, layouts)
