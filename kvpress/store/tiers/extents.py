"""Which parts of an arena or of a file are taken: first fit, neighbours joined when freed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from kvpress.errors import CacheError
from kvpress.formulas.sizes import round_up

UNIT = 4096  # bytes; what direct I/O asks of offsets, lengths and addresses


class Extents:
    """The parts of `size` bytes, rounded down to whole units, from `base` on.

    Where a part lies depends on the order of calls only. A call costs as much as there are holes.
    """

    def __init__(self, size: int, base: int = 0) -> None:
        self.base, self.size = base, size // UNIT * UNIT
        self._holes = [(base, base + self.size)] if self.size else []  # begin and end, in order
        self.taken: dict[int, int] = {}  # bytes by place
        self.held = 0  # bytes

    @property
    def largest(self) -> int:
        """Bytes of the largest hole."""
        return max((end - begin for begin, end in self._holes), default=0)

    def take(self, size: int) -> int | None:
        """The place of `size` bytes, rounded up to units; None if no hole is large enough."""
        size = round_up(size, UNIT)
        for index, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                self._holes[index : index + 1] = [(begin + size, end)] if begin + size < end else []
                self.taken[begin] = size
                self.held += size
                return begin
        return None

    def give(self, place: int) -> None:
        """Frees what was taken at `place`. Raises CacheError if nothing was."""
        size = self.taken.pop(place, 0)
        if not size:
            raise CacheError(f"nothing is held at {place}; it was freed twice or never taken")
        self.held -= size
        index = bisect_left(self._holes, (place, 0))
        begin, end, last = place, place + size, index
        if index and self._holes[index - 1][1] == begin:
            index -= 1
            begin = self._holes[index][0]
        if last < len(self._holes) and self._holes[last][0] == end:
            end = self._holes[last][1]
            last += 1
        self._holes[index:last] = [(begin, end)]

    def check(self, expected: Mapping[int, int]) -> None:
        """Raises CacheError unless exactly `expected` is taken and the holes are all the rest."""
        if expected != self.taken:
            odd = sorted(expected.items() ^ self.taken.items())[:4]
            raise CacheError(f"taken extents are not those of the records: {odd}")
        parts = sorted([*((p, p + n) for p, n in self.taken.items()), *self._holes])
        at = self.base
        for begin, end in parts:
            if begin != at:
                raise CacheError(f"the extent at {begin} should begin at {at}")
            at = end
        if at != self.base + self.size or self.held != sum(self.taken.values()):
            raise CacheError(f"extents end at {at} of {self.base + self.size} bytes")
