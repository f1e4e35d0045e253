"""What is asked of a plan: a model in numbers, and the texts that it is to read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvpress.types import LayerKind


class Shape(NamedTuple):
    """A model, as far as bytes depend on it.

    name: of the model. inner: channels of an MLP at once. vocabulary: words of the logits. dtype:
    of what it computes in; stored: of keys and values in the cache.
    """

    name: str
    kinds: tuple[LayerKind, ...]
    hidden: int
    inner: int
    vocabulary: int
    dtype: torch.dtype
    stored: torch.dtype
    page_slots: int

    @property
    def tiered(self) -> tuple[LayerKind, ...]:
        """The layers whose pages may be in any tier: those without a window."""
        return tuple(kind for kind in self.kinds if kind.window is None)


class Texts(NamedTuple):
    """The texts that one cache holds at the most.

    length: tokens of a sequence in the end. new: of these, that are decoded behind the prompt.
    """

    batch: int
    length: int
    new: int

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.length - self.new

    def __str__(self) -> str:
        tokens = f"{self.length:,} tokens ({self.new:,} of them decoded)"
        return f"{self.batch} sequence{'s' * (self.batch > 1)} of {tokens}"
