"""Where the bytes of every page are: on a device, in a record of the lower tiers, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress import host

NOWHERE = -1


class Directory:
    """Pages by numbers that stay theirs while they move.

    at_P: where on its device, NOWHERE if it is not there. record_P: the number of its record, or
    NOWHERE. place_P: the page of that record. step_P: the step that last chose to read it, where
    steps choose. All int64, on the host. idle_P: whether the last step of its rows did not: bool.
    """

    def __init__(self) -> None:
        self.at_P = self.record_P = self.place_P = self.step_P = host.zeros(0)
        self.idle_P = host.full((0,), True, torch.bool)
        self.records: dict[int, Any] = {}  # by number, what the vault gave
        self._pages: dict[int, int] = {}  # of every record that are in use
        self._free: list[int] = []
        self.version = 0  # grows with every move

    def enter(self, count: int) -> Tensor:
        """Numbers for so many new pages, which are nowhere yet: int64 `[A]`."""
        missing = count - len(self._free)
        if missing > 0:
            old = len(self.at_P)
            more = max(missing, old // 2)
            nowhere = host.full((more,), NOWHERE)
            self.at_P, self.record_P, self.place_P, self.step_P = (
                torch.cat([x, nowhere])
                for x in (self.at_P, self.record_P, self.place_P, self.step_P)
            )
            self.idle_P = torch.cat([self.idle_P, nowhere == NOWHERE])
            self._free = list(range(old + more - 1, old - 1, -1)) + self._free
        return host.tensor([self._free.pop() for _ in range(count)])

    def arrive(self, id_A: Tensor, at_A: Tensor) -> None:
        """Says where on the device pages are."""
        self.at_P[id_A] = at_A
        self.version += 1

    def depart(self, id_A: Tensor) -> Tensor:
        """Says that pages are not on the device any more. Returns where they were."""
        at_A = self.at_P[id_A]
        self.at_P[id_A] = NOWHERE
        self.version += 1
        return at_A

    def choose(self, before_A: Tensor, last: int | Tensor, id_A: Tensor, step: int) -> Tensor:
        """Says that a step chose some pages, and the step `last` of the same rows those before.

        Returns which of those are idle now: not what other rows chose since, nor numbers that were
        given to other pages.
        """
        before_A = before_A[self.step_P[before_A] == last]
        self.idle_P[before_A] = True
        self.idle_P[id_A] = False
        self.step_P[id_A] = step
        return before_A[self.idle_P[before_A]]

    def is_spare(self, id_A: Tensor) -> Tensor:
        """Which pages are on the device, have a copy below and are idle: bool."""
        there_A = (self.at_P[id_A] != NOWHERE) & (self.record_P[id_A] != NOWHERE)
        return there_A & self.idle_P[id_A]

    def spare(self) -> Tensor:
        """All of these, the one that was chosen longest ago first."""
        there_P = (self.at_P != NOWHERE) & (self.record_P != NOWHERE) & self.idle_P
        id_A = there_P.nonzero().flatten()
        return id_A[self.step_P[id_A].argsort(stable=True)]

    def seal(self, id_A: Tensor, record: Any, place_A: Tensor | None = None) -> None:
        """Says that pages are those of a record, all in order, or some at these places."""
        place_A = host.arange(len(id_A)) if place_A is None else place_A
        self.record_P[id_A], self.place_P[id_A] = record.number, place_A
        self.records[record.number] = record
        self._pages[record.number] = len(id_A)
        self.version += 1

    def by_record(self, id_A: Tensor) -> Tensor:
        """The order in which pages that have records lie in them: int64 `[A]`."""
        record_A, place_A = self.record_P[id_A], self.place_P[id_A]
        if not len(id_A):
            return record_A
        return (record_A * (int(place_A.max()) + 1) + place_A).argsort()

    def forget(self, id_A: Tensor) -> tuple[Tensor, list[Any]]:
        """Drops pages that nobody has any more.

        Returns where on the device some of them were, and the records of which none is left.
        """
        if not len(id_A):
            return host.zeros(0), []
        at_A, record_A = self.at_P[id_A], self.record_P[id_A]
        ended = []
        numbers, counts = torch.unique(record_A[record_A != NOWHERE], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._pages[number] -= count
            if not self._pages[number]:
                del self._pages[number]
                ended.append(self.records.pop(number))
        for column_P in (self.at_P, self.record_P, self.place_P, self.step_P):
            column_P[id_A] = NOWHERE
        self.idle_P[id_A] = True
        self._free.extend(id_A.tolist())
        self.version += 1
        return at_A[at_A != NOWHERE], ended

    def known(self) -> Tensor:
        """Which numbers name a page: bool."""
        known_P = torch.ones(len(self.at_P), dtype=torch.bool, device="cpu")
        known_P[host.tensor(self._free)] = False
        return known_P
