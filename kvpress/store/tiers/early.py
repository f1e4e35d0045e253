"""Pages that are read before anybody asks for them: to places of their own, or for one step."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait

import torch
from torch import Tensor

from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.arrivals import Around, Arrivals
from kvpress.store.tiers.directory import NOWHERE, Directory


class _OnTheirWay:
    """Pages that a thread copies."""

    def __init__(self, copied: Future[None]) -> None:
        self._copied = copied

    def __deepcopy__(self, memo: object) -> _OnTheirWay:
        return self  # copies of rows wait for the same

    def end(self) -> None:
        """Returns when nothing is on its way any more, whether it has failed or not."""
        wait([self._copied])

    def arrived(self) -> bool:
        """Waits; False where they could not be read: then nothing is where they were to go."""
        return self._copied.exception() is None


class Coming(_OnTheirWay):
    """Pages that are brought to places of the device which are theirs from now on.

    They are known to be there once somebody has asked for them: see `Early.settle`.
    """

    def __init__(self, id_A: Tensor, at_A: Tensor, copied: Future[None]) -> None:
        super().__init__(copied)
        self.id_A, self.at_A = id_A, at_A


class Staged(_OnTheirWay):
    """Pages on their way to a half of the staging, for the next step of some rows alone.

    id_A: ascending. at_A: where each will be. lost: whether others were sent there, or the numbers
    of pages were given to others, before these were used.
    """

    def __init__(self, id_A: Tensor, half_A: Tensor, copied: Future[None]) -> None:
        super().__init__(copied)
        self.id_A, self.at_A, self._spare_A = id_A, half_A[: len(id_A)], half_A[len(id_A) :]
        self.lost = False

    def spare(self) -> Tensor:
        """The places of that half that are left."""
        return self._spare_A

    def find(self, id_A: Tensor, at_A: Tensor) -> None:
        """Says of those pages that are here and nowhere else where they are."""
        place_A = torch.searchsorted(self.id_A, id_A).clamp_max(len(self.id_A) - 1)
        here_A = (self.id_A[place_A] == id_A) & (at_A == NOWHERE)
        at_A[here_A] = self.at_A[place_A[here_A]]


class Early:
    """What is on its way to one shelf early. What could not be read is asked for again later."""

    def __init__(
        self, tiers: Around, arena: Arena, directory: Directory, arrivals: Arrivals, size: int
    ) -> None:
        self._tiers, self._arena, self._directory = tiers, arena, directory
        self._arrivals, self._size = arrivals, size
        self._staging = arena.staging(size)
        self._coming: list[Coming] = []
        self._staged: deque[Staged] = deque(maxlen=len(self._staging))  # in each half the last

    def forget(self) -> None:
        """Waits for what has begun, before numbers of pages are given to others."""
        self.settle()
        for staged in self._staged:
            staged.lost = True

    def begin(self, id_A: Tensor, at_A: Tensor) -> Coming | None:
        """Begins to copy pages to places that were taken for them."""
        if not len(id_A):
            return None
        copied = self._arrivals.bring_ahead(id_A, at_A, self._arena.pages(self._size))
        self._coming.append(Coming(id_A, at_A, copied))
        return self._coming[-1]

    def settle(self, last: Coming | None = None) -> None:
        """Waits for what has begun: all of it, or up to this."""
        if last is not None and last not in self._coming:
            return
        count = len(self._coming) if last is None else self._coming.index(last) + 1
        for own in self._coming[:count]:
            with self._tiers.stalls:
                arrived = own.arrived()
            self._coming.remove(own)
            new_A = self._directory.at_P[own.id_A] == NOWHERE  # others may have brought them since
            new_A &= arrived
            self._directory.arrive(own.id_A[new_A], own.at_A[new_A])
            self._tiers.uses.brought += int(new_A.sum())
            self._arena.give(own.at_A[~new_A], self._size)

    def claim(self) -> Tensor:
        """The places of a half of the staging, for whoever copies to it at once."""
        return self._staging[self._arena.claim()]

    def stage(self, id_A: Tensor) -> Staged | None:
        """Begins to copy pages (ascending) to a half of the staging; None where they are too many.

        Those that have no place on the device, before they are asked for.
        """
        if not 0 < len(id_A) <= min(map(len, self._staging)):
            return None
        half = self._arena.turn()
        half_A = self._staging[half]
        to_A = half_A[: len(id_A)]
        copied = self._arrivals.bring_ahead(id_A, to_A, self._arena.pages(self._size))
        staged = Staged(id_A, half_A, copied)
        self._arena.hold(half, staged)
        self._staged.append(staged)
        return staged

    def unstage(self, staged: Staged | None) -> Staged | None:
        """What was staged, once it is there; None where it is not, or others came in between."""
        if staged is None or staged.lost:
            return None
        with self._tiers.stalls:
            arrived = staged.arrived()
        if not arrived:
            return None
        self._arena.keep(staged)
        self._tiers.uses.brought += len(staged.id_A)
        return staged
