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
        self.queries: list[Tensor] = []  # `[B, N, Q, D]`, where a policy wants them

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and the queries."""
        return sum(block.nbytes for block in (*self.blocks, *self.queries))

    def take_back(self, tokens: int) -> int:
        """Forgets the last tokens. Returns how many of them were drafts."""
        drafted = min(tokens, self.tokens)
        self.tokens -= drafted
        for blocks in (self.blocks, self.queries):
            _take_back(blocks, drafted)
        return drafted

    def finish(self) -> tuple[int, Tensor | None, Tensor | None]:
        """Ends as no drafts: how many there were, their weights `[B, N, Q, S]`, their queries.

        A token has no weight at slots that came after it.
        """
        tokens, blocks, queries = self.tokens, self.blocks, self.queries
        self.tokens, self.blocks, self.queries = 0, [], []
        slots = max((block.shape[-1] for block in blocks), default=0)
        padded = [F.pad(block, (0, slots - block.shape[-1])) for block in blocks]
        return tokens, _joined(padded), _joined(queries)

    def select(self, index: Sequence[int]) -> Drafts:
        """Sequence i becomes what sequence `index[i]` was."""
        chosen = list(index)
        return self._with(*([x[chosen] for x in of] for of in (self.blocks, self.queries)))

    def clone(self) -> Drafts:
        """Others that go on by themselves: blocks are replaced, never written to."""
        return self._with(list(self.blocks), list(self.queries))

    def state(self) -> dict[str, Tensor]:
        """Nothing: drafts become final before a cache is saved."""
        return {}

    def _with(self, blocks: list[Tensor], queries: list[Tensor]) -> Drafts:
        other = Drafts()
        other.tokens, other.blocks, other.queries = self.tokens, blocks, queries
        return other


def _take_back(blocks: list[Tensor], tokens: int) -> None:
    """Takes the last tokens out of blocks `[B, N, Q, ...]`."""
    while tokens and blocks:
        last = blocks.pop()
        kept = last.shape[2] - tokens
        if kept > 0:
            blocks.append(last[:, :, :kept].clone())
        tokens = max(0, -kept)


def _joined(blocks: list[Tensor]) -> Tensor | None:
    return torch.cat(blocks, dim=2) if blocks else None
