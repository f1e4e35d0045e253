"""Tokens that may still be taken back, as speculative decoding feeds them: who says so, and them.

A caller switches recording on, and may announce before each forward pass how many of its tokens are
drafts. Every layer keeps what they attended to. `crop` takes some of them back; the next pass makes
the others final.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Recording:
    """What a caller said about the tokens of a cache."""

    def __init__(self) -> None:
        self.on = False  # whether tokens may be taken back until the next forward pass
        self._announced: int | None = None  # drafts of the coming pass, where that is known

    def announce(self, judged: Any) -> None:
        """Says how many of the last tokens of the coming pass the caller will judge.

        All but the first of them are drafted. Anything but a number above 0: not known.
        """
        known = isinstance(judged, int) and judged > 0
        self._announced = judged - 1 if known else None

    def drafted(self, tokens: int, first: bool) -> int:
        """How many of the tokens of a recorded pass may be taken back; by default all or none.

        first: whether the cache is empty.
        """
        default = 0 if first else tokens
        return default if self._announced is None else min(self._announced, tokens)


class Drafts:
    """The drafted tokens of a layer, as many of every sequence, and what they attended to."""

    def __init__(self) -> None:
        self.tokens = 0
        self.blocks: list[Tensor] = []  # softmax weights `[B, N, Q, S]`, where a policy wants them

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(block.nbytes for block in self.blocks)

    def take_back(self, tokens: int) -> int:
        """Forgets the last tokens. Returns how many of them were drafts."""
        drafted = left = min(tokens, self.tokens)
        self.tokens -= drafted
        while left and self.blocks:
            last = self.blocks.pop()
            kept = last.shape[2] - left
            if kept > 0:
                self.blocks.append(last[:, :, :kept].clone())
            left = max(0, -kept)
        return drafted

    def finish(self) -> tuple[int, Tensor | None]:
        """Ends as no drafts: how many there were, and their weights `[B, N, Q, S]`.

        A token has no weight at slots that came after it.
        """
        tokens, blocks = self.tokens, self.blocks
        self.tokens, self.blocks = 0, []
        if not blocks:
            return tokens, None
        slots = max(block.shape[-1] for block in blocks)
        padded = [F.pad(block, (0, slots - block.shape[-1])) for block in blocks]
        return tokens, torch.cat(padded, dim=2)

    def select(self, index: Sequence[int]) -> Drafts:
        """Sequence i becomes what sequence `index[i]` was."""
        return self._with([block[list(index)] for block in self.blocks])

    def clone(self) -> Drafts:
        """Others that go on by themselves: blocks are replaced, never written to."""
        return self._with(list(self.blocks))

    def state(self) -> dict[str, Tensor]:
        """Nothing: drafts become final before a cache is saved."""
        return {}

    def _with(self, blocks: list[Tensor]) -> Drafts:
        other = Drafts()
        other.tokens, other.blocks = self.tokens, blocks
        return other
