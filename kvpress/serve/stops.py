"""Texts that end an answer: they are no part of it, nor is what may become one shown."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Passes text on up to the first of some texts.

    found: whether one has come; nothing is passed on afterwards. passed: characters so far.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found = False
        self.passed = 0

    def add(self, piece: str) -> str:
        """What can be shown now."""
        if self.found:
            return ""
        held = self._held + piece
        places = [at for text in self._texts if (at := held.find(text)) >= 0]
        if places:
            self.found = True
            return self._pass(held[: min(places)], "")
        keep = max((_overlap(held, text) for text in self._texts), default=0)
        shown = len(held) - keep
        return self._pass(held[:shown], held[shown:])

    def finish(self) -> str:
        """What was held back and has come to nothing."""
        return self._pass(self._held, "")

    def _pass(self, shown: str, held: str) -> str:
        self._held = held
        self.passed += len(shown)
        return shown


def _overlap(held: str, text: str) -> int:
    """How many characters at the end of one text begin the other."""
    most = min(len(held), len(text) - 1)
    return next((n for n in range(most, 0, -1) if held.endswith(text[:n])), 0)
