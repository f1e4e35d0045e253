"""What the steps of some rows choose to read, and bringing it to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.tiers.arrivals import Tenant
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.early import Coming, Staged
from kvpress.store.tiers.shelf import Half, Shelf


class Brought(NamedTuple):
    """Pages that a step chose: where they are, NOWHERE where they found no room.

    here: that were on the device; copied: to it; whole: whether all are there now.
    """

    at_A: Tensor
    here: int
    copied: int
    whole: bool


class Steps:
    """The steps of rows whose pages are on a shelf.

    chosen: pages, by the last step, whose number is `last`. foreseen: whether they are what the
    next one will choose. bare: whether pages without a copy may be on the device that it did not.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.chosen, self.last, self.foreseen, self.bare = host.zeros(0), 0, False, True
        self._coming: Coming | None = None  # what is brought for the next one
        self._staged: Staged | None = None  # what the next one will find for itself alone

    def bring(self, id_A: Tensor, staged: bool, rows: Tenant) -> Brought:
        """Brings the pages that a step chose to the device, as far as others may go for them.

        Those of the last step are there: what is copied is what they have not in common. staged:
        whether what finds no room may be where pages are on their way, for this step alone. Raises
        TierError.
        """
        shelf = self.shelf
        with shelf.tiers.lock:
            early, coming = self._staged, self._coming
            self._staged = self._coming = None
            if coming is not None:
                shelf.early.settle(coming)
            before_A, last, step = self.chosen, self.last, shelf.tiers.tick()
            self.bare |= shelf.idle.choose(before_A, last, id_A, step)
            self.chosen, self.last, self.foreseen = id_A, step, False
            at_A = shelf.directory.at_P[id_A]
            here = int((at_A != NOWHERE).sum())
            ready = shelf.early.unstage(early) if staged and here < len(id_A) else None
            if ready is not None:
                ready.find(id_A, at_A)
            away_A = (at_A == NOWHERE).nonzero().flatten()
            if not len(away_A):
                return Brought(at_A, here, len(at_A) - here, True)
            half: Half | None = None
            if staged:
                half = shelf.early.claim if ready is None else ready.spare
            at_A[away_A], whole = self._bring(id_A[away_A], half, rows)
            return Brought(at_A, here, int((at_A != NOWHERE).sum()) - here, whole)

    def _bring(self, id_A: Tensor, half: Half | None, rows: Tenant) -> tuple[Tensor, bool]:
        """Where pages are that were away, and whether all are there now."""
        shelf = self.shelf
        missing_A, which_A = torch.unique(id_A, return_inverse=True)
        room = shelf.tiers.make_space(len(missing_A) * shelf.page_bytes, shelf.arena, rows)
        to_A = shelf.bring(missing_A, room // shelf.page_bytes, half)
        whole = len(to_A) == len(missing_A)
        if not whole:
            to_A = torch.cat([to_A, host.full((len(missing_A) - len(to_A),), NOWHERE)])
        return to_A[which_A], whole

    def expect(self, id_A: Tensor, step: int, bare: bool) -> None:
        """Says what the next step will most likely choose.

        step: as which it was chosen. bare: whether pages without a copy may have become idle by
        that.
        """
        self.chosen, self.last, self.foreseen = id_A, step, True
        self.bare |= bare
        self._coming = self._staged = None  # of a pass that failed

    def wait_for(self, coming: Coming | None) -> None:
        """Says what of it is on its way."""
        self._coming = coming

    def stage(self) -> None:
        """Begins to read what is foreseen of the next step and has no place on the device.

        What the last step chose is no help: most of what is missing is what it had not.
        """
        with self.shelf.tiers.lock:
            away_A = self.chosen[self.shelf.directory.at_P[self.chosen] == NOWHERE]
            if self._coming is not None:
                away_A = away_A[~torch.isin(away_A, self._coming.id_A)]
            self._staged = self.shelf.early.stage(torch.unique(away_A))
