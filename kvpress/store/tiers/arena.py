"""The device tier: one run of bytes of a fixed size, in which pages of any size find room."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.tiers.untouched import untouch

HALVES = 2  # of the staging


class Holder(Protocol):
    """Who has pages in the staging."""

    lost: bool

    def end(self) -> None:
        """Returns when nothing is on its way there."""


class _Nobody:
    lost = True

    def end(self) -> None:
        return


class Arena:
    """Pages of one device, by numbers: page p of b bytes lies at byte p·b.

    So an operator gets the arena as a pool of pages of the size that it reads, whatever sizes other
    layers have. The memory is made once; that of a CPU is touched, and so really there, only where
    pages lie, or single ones lay. half: bytes at its end, twice, for pages on their way.
    """

    def __init__(self, size: int, half: int, device: torch.device) -> None:
        self.size, self.half, self.device = size, half, device
        self.memory_X = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0  # bytes of pages
        self._begin, self._end = [0], [size - 2 * half]  # of free runs, ascending
        self._turn = 0
        self._holders: list[Holder] = [_Nobody(), _Nobody()]

    @property
    def free(self) -> int:
        """Bytes that no page has and none on its way."""
        return self.size - 2 * self.half - self.used

    def staging(self, page_bytes: int) -> tuple[Tensor, Tensor]:
        """The numbers of pages that are nobody's, for two halves of what is on its way."""
        begin, middle, end = self.size - 2 * self.half, self.size - self.half, self.size
        first, second = (-(-x // page_bytes) for x in (begin, middle))
        return host.arange(first, middle // page_bytes), host.arange(second, end // page_bytes)

    def turn(self) -> int:
        """The half of the staging that is free next: they are used in turn."""
        self._turn = 1 - self._turn
        return self._turn

    def claim(self) -> int:
        """The same for whoever copies to it at once, when nothing is on its way there."""
        half = self.turn()
        self._holders[half].end()
        self.hold(half, _Nobody())
        return half

    def keep(self, holder: Holder) -> None:
        """Says that what a holder has there is used now: the other half is free next."""
        if holder in self._holders:
            self._turn = self._holders.index(holder)

    def hold(self, half: int, holder: Holder) -> None:
        """Says whose pages are on their way in a half of the staging now; the last one's are lost.

        Whoever is being read by an operator is not asked: a half is taken again only after that.
        """
        self._holders[half].lost = True
        self._holders[half] = holder

    def pages(self, page_bytes: int) -> Tensor:
        """The arena as a pool of such pages, `[P, page_bytes]`."""
        count = self.size // page_bytes
        return self.memory_X[: count * page_bytes].view(count, page_bytes)

    def take(self, count: int, page_bytes: int) -> Tensor:
        """The numbers of so many free pages, or of fewer where there are no more: int64, host."""
        taken: list[int] = []
        i = 0
        while len(taken) < count and i < len(self._begin):
            begin, end = self._begin[i], self._end[i]
            first = -(-begin // page_bytes)  # a page begins at a multiple of its size
            last = min(first + count - len(taken), end // page_bytes)
            if first >= last:
                i += 1
                continue
            taken.extend(range(first, last))
            rest = [(begin, first * page_bytes), (last * page_bytes, end)]
            left = [run for run in rest if run[0] < run[1]]
            self._begin[i : i + 1] = [run[0] for run in left]
            self._end[i : i + 1] = [run[1] for run in left]
        self.used += len(taken) * page_bytes
        return host.tensor(taken)

    def give(self, page_A: Tensor, page_bytes: int) -> None:
        """Gives pages back, each of them once."""
        begin = end = -1
        for page in [*sorted(page_A.tolist()), -1]:  # neighbours as one run
            if page == end:
                end += 1
                continue
            if begin >= 0:
                untouch(self.memory_X, begin * page_bytes, end * page_bytes)
                self._free(begin * page_bytes, end * page_bytes)
            begin, end = page, page + 1
        self.used -= len(page_A) * page_bytes

    def _free(self, begin: int, end: int) -> None:
        """Makes a run free, joined with those that it touches."""
        i = bisect_left(self._begin, begin)
        if i and self._end[i - 1] == begin:
            i -= 1
            begin = self._begin.pop(i)
            self._end.pop(i)
        if i < len(self._begin) and self._begin[i] == end:
            end = self._end.pop(i)
            self._begin.pop(i)
        self._begin.insert(i, begin)
        self._end.insert(i, end)
