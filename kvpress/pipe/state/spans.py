"""Tokens that the caller protects: ranges of positions of every sequence, kept as sinks are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.types import EMPTY

Ranges = tuple[tuple[int, int], ...]  # (first, behind the last), in real tokens


def ranges_of(given: Any) -> Ranges:
    """Ranges in order, those that touch joined: of a number of first tokens, or of pairs.

    Raises CacheError for what is neither.
    """
    pairs = [(0, given)] if isinstance(given, int) and not isinstance(given, bool) else given
    joined: list[tuple[int, int]] = []
    try:
        for first, last in sorted((operator.index(a), operator.index(b)) for a, b in pairs):
            if not 0 <= first < last:
                raise ValueError
            if joined and first <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"protect={given!r} is neither a number of first tokens nor a list of ranges (first,"
            " behind the last) with 0 <= first < last, in tokens without padding."
        ) from error
    return tuple(joined)


class Spans:
    """The protected ranges of every sequence behind its sinks, which hold those from 0 on."""

    def __init__(self, ranges: Sequence[Ranges] = ()) -> None:
        self.ranges = list(ranges)

    def __bool__(self) -> bool:
        """Whether some sequence has any."""
        return any(self.ranges)

    def count(self, sequence: int, seen: int) -> int:
        """How many of the first `seen` tokens of a sequence they hold."""
        ranges = self.ranges[sequence] if self.ranges else ()
        return sum(max(0, min(last, seen) - first) for first, last in ranges)

    def hold(self, position_BHS: Tensor, group: Sequence[int]) -> Tensor:
        """True for the slots of some sequences that are in a range."""
        held_BHS = torch.zeros_like(position_BHS, dtype=torch.bool)
        for i, b in enumerate(group):
            for first, last in self.ranges[b] if self.ranges else ():
                held_BHS[i] |= (position_BHS[i] >= first) & (position_BHS[i] < last)
        return held_BHS & (position_BHS != EMPTY)

    def select(self, index: Sequence[int]) -> Spans:
        """Sequence i becomes what sequence `index[i]` was."""
        return Spans([self.ranges[b] for b in index] if self.ranges else ())

    def clone(self) -> Spans:
        """Another one that goes on by itself."""
        return Spans(self.ranges)

    def state(self) -> dict[str, Tensor]:
        """`spans`: rows of (sequence, first, behind the last), int64 `[A, 3]`."""
        rows = [(b, *span) for b, ranges in enumerate(self.ranges) for span in ranges]
        return {"spans": host.tensor(rows).view(-1, 3)}

    @classmethod
    def load(cls, spans_A3: Tensor, sequences: int) -> Spans:
        """What `state` gave. Raises CacheError for what no caller can have protected."""
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(sequences)]
        for b, first, last in spans_A3.tolist():
            if not 0 <= b < sequences or not 0 < first < last:
                raise CacheError(f"Tokens {first} to {last} of sequence {b} cannot be protected.")
            ranges[b].append((first, last))
        made = cls([ranges_of(own) for own in ranges])
        if made.state()["spans"].tolist() != spans_A3.tolist():
            raise CacheError("Protected tokens are named twice or in another order.")
        return made if made else cls()
