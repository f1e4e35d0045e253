"""What the steps of some rows choose to read, and bringing it to the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.moves import Moves
from kvpress.store.tiers.arrivals import Tenant
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.early import Coming, Staged
from kvpress.store.tiers.shelf import Half, Shelf


class Brought(NamedTuple):
    """Pages that a step chose: where they are, NOWHERE where they found no room.

    here: that were on the device; copied: to it; whole: whether all are there now. moves: what was
    missing of them.
    """

    at_A: Tensor
    here: int
    copied: int
    whole: bool
    moves: Moves


class Steps:
    """The steps of rows whose pages are on a shelf.

    chosen: pages, by the last step, whose number is `last`. foreseen: whether they are what the
    next one will choose. bare: whether pages without a copy may be on the device that it did not.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.chosen, self.last, self.foreseen, self.bare = host.zeros(0), 0, False, True
        self._coming: Coming | None = None  # what is brought for the next one
        self._begun = host.zeros(0)  # which pages of these rows that are
        self._staged: Staged | None = None  # what the next one will find for itself alone
        self._lost = 0  # pages that were brought for one that never came
        self._before: tuple[Sequence[int] | None, Tensor] | None = None  # rows and pages

    def copied(self) -> Steps:
        """Those of other rows, which were no others until now: what came last is not theirs."""
        other = copy.copy(self)
        other.forget_rows()
        return other

    def forget_rows(self) -> None:
        """Says that the next step has no step of the same rows before it."""
        self._before = None

    def bring(self, id_A: Tensor, staged: bool, rows: Tenant) -> Brought:
        """Brings the pages that a step chose to the device, as far as others may go for them.

        Those of the last step are there: what is copied is what they have not in common. staged:
        whether what finds no room may be where pages are on their way, for this step alone. Raises
        TierError.
        """
        shelf = self.shelf
        with shelf.tiers.lock:
            early, came_A = self._staged, self._came()
            before_A, last, step = self.chosen, self.last, shelf.tiers.tick()
            self.bare |= shelf.idle.choose(before_A, last, id_A, step)
            self.chosen, self.last, self.foreseen = id_A, step, False
            at_A = shelf.directory.at_P[id_A]
            here = int((at_A != NOWHERE).sum())
            ready = shelf.early.unstage(early) if staged and here < len(id_A) else None
            if ready is not None:
                ready.find(id_A, at_A)
            away_A = (at_A == NOWHERE).nonzero().flatten()
            missing_A, which_A = torch.unique(id_A[away_A], return_inverse=True)
            moves = self._moves(id_A, came_A, ready, len(missing_A))
            if not len(away_A):
                return Brought(at_A, here, len(at_A) - here, True, moves)
            half: Half | None = None
            if staged:
                half = shelf.early.claim if ready is None else ready.spare
            to_A = self._bring(missing_A, half, rows)
            at_A[away_A], whole = to_A[which_A], bool((to_A != NOWHERE).all())
            return Brought(at_A, here, int((at_A != NOWHERE).sum()) - here, whole, moves)

    def _bring(self, missing_A: Tensor, half: Half | None, rows: Tenant) -> Tensor:
        """Where pages are that were away; NOWHERE for the last ones, if they found no room."""
        shelf = self.shelf
        room = shelf.tiers.make_space(len(missing_A) * shelf.page_bytes, shelf.arena, rows)
        to_A = shelf.bring(missing_A, room // shelf.page_bytes, half)
        return torch.cat([to_A, host.full((len(missing_A) - len(to_A),), NOWHERE)])

    def _came(self) -> Tensor:
        """The pages that were brought ahead and are there; their numbers may be others' by now."""
        self.settle()
        own, id_A = self.shelf.directory, self._begun
        return id_A[(own.at_P[id_A] != NOWHERE) & (own.step_P[id_A] != NOWHERE)]

    def _moves(self, id_A: Tensor, came_A: Tensor, ready: Staged | None, missing: int) -> Moves:
        """What of some pages was missing. missing: that is still."""
        self._forget_loads()
        begun, self._lost = self._lost, 0
        if not begun:
            return Moves(missing=missing)
        found_A = came_A if ready is None else torch.cat([came_A, ready.id_A])
        ahead = int(torch.isin(found_A, id_A).sum())
        return Moves(missing=missing + ahead, ahead=ahead, vain=begun - ahead)

    def _forget_loads(self) -> None:
        """Counts as lost what was brought ahead, until somebody finds it."""
        self._lost += len(self._begun) + (0 if self._staged is None else len(self._staged.id_A))
        self._begun, self._staged = host.zeros(0), None

    def compare(self, sequences: Sequence[int] | None, id_rW: Tensor) -> Moves:
        """What a step chose (NOWHERE behind the last page of a row) that the last one had too."""
        rows, held_rW = len(id_rW), id_rW != NOWHERE
        key_A = (id_rW * rows + host.arange(rows)[:, None])[held_rW]  # beams share pages
        before, self._before = self._before, (sequences, key_A)
        if before is None or before[0] != sequences:
            return Moves()
        return Moves(adjacent=len(key_A), again=int(torch.isin(key_A, before[1]).sum()))

    def settle(self) -> None:
        """Waits for what was brought ahead."""
        coming, self._coming = self._coming, None
        if coming is not None:
            self.shelf.early.settle(coming)

    def expect(self, id_A: Tensor, step: int, bare: bool) -> None:
        """Says what the next step will most likely choose.

        step: as which it was chosen. bare: whether pages without a copy may have become idle by
        that.
        """
        self.chosen, self.last, self.foreseen = id_A, step, True
        self.bare |= bare
        self.settle()
        self._forget_loads()  # of a pass that failed

    def wait_for(self, coming: Coming | None, id_A: Tensor) -> None:
        """Says what of it is on its way, with these pages of its own."""
        self._coming, self._begun = coming, id_A

    def stage(self) -> None:
        """Begins to read what is foreseen of the next step and has no place on the device.

        What the last step chose is no help: most of what is missing is what it had not.
        """
        with self.shelf.tiers.lock:
            away_A = self.chosen[self.shelf.directory.at_P[self.chosen] == NOWHERE]
            if self._coming is not None:
                away_A = away_A[~torch.isin(away_A, self._coming.id_A)]
            self._lost += 0 if self._staged is None else len(self._staged.id_A)
            self._staged = self.shelf.early.stage(torch.unique(away_A)) if len(away_A) else None
