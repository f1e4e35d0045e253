"""One answer as it comes: tokens become text, up to an end token or a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvpress.batching.request import Drawn
from kvpress.serve.pieces import Pieces
from kvpress.serve.stops import Stops


class Part(NamedTuple):
    """A part of an answer. drawn: its tokens and where each begins, in characters."""

    text: str
    drawn: tuple[tuple[Drawn, int], ...] = ()


class Reading:
    """Reads tokens one after another, so that a text does not depend on how many come at once.

    ends: ids that end the text and are no part of it. tokens: the others so far.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], ends: Sequence[int]
    ) -> None:
        self._pieces, self._stops, self._ends = Pieces(decode), Stops(stop), frozenset(ends)
        self._length = 0  # characters of all pieces
        self._waiting: deque[tuple[Drawn, int]] = deque()  # whose text is not shown yet
        self.tokens: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come: the rest is not wanted."""
        return self._stops.found

    def add(self, drawn: Sequence[Drawn]) -> Part:
        """What can be shown of it now."""
        text = []
        for one in drawn:
            if self.stopped or one.token in self._ends:
                continue
            self.tokens.append(one.token)
            self._waiting.append((one, self._length))
            piece = self._pieces.add(one.token)
            self._length += len(piece)
            text.append(self._stops.add(piece))
        return Part("".join(text), self._shown())

    def finish(self) -> Part:
        """What was held back."""
        if self.stopped:
            self._waiting.clear()
            return Part("")
        text = self._stops.add(self._pieces.finish())
        if not self.stopped:
            text += self._stops.finish()
            rest, self._waiting = tuple(self._waiting), deque()
            return Part(text, rest)
        return Part(text, self._shown())

    def _shown(self) -> tuple[tuple[Drawn, int], ...]:
        """The tokens that begin before what was shown last."""
        found = []
        while self._waiting and self._waiting[0][1] < self._stops.passed:
            found.append(self._waiting.popleft())
        return tuple(found)
