"""Text of tokens as they come: a character appears once all of its tokens are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one
MOST_HELD = 8  # tokens that may be waited for; a character has four bytes, most tokens have more
LONGEST = 16  # tokens decoded at once


class Pieces:
    """Joins to what a tokenizer makes of all tokens at once.

    Only a window of the last tokens is decoded, so that a token costs the same however long the
    text is. A window begins where a character ends, with tokens whose text is known: some
    tokenizers write the first word without its space.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._known = ""  # text of the window that was handed out
        self._seam = 0  # where the tokens begin whose text was handed out last
        self._held = 0

    def add(self, token: int) -> str:
        """The text that is certain now; empty within a character."""
        self._window.append(token)
        text = self._decode(self._window)
        self._held += 1
        if text.endswith(UNFINISHED) and self._held < MOST_HELD:
            return ""
        piece = text[len(self._known) :]
        self._known = text
        if piece:
            self._move_on()
        self._held = 0
        return piece

    def finish(self) -> str:
        """What is left, whole or not."""
        if not self._held:
            return ""
        piece = self._decode(self._window)[len(self._known) :]
        self._held = 0
        return piece

    def _move_on(self) -> None:
        """Begins a new window with the tokens of the newest piece, where the old one is long."""
        newest = len(self._window) - self._held
        if len(self._window) > LONGEST and self._seam:
            self._window = self._window[self._seam :]
            newest -= self._seam
            self._known = self._decode(self._window)
        self._seam = newest
