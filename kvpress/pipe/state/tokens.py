"""New tokens of a layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops import Logits


class Tokens(NamedTuple):
    """New tokens of some sequences of one layer, all real, and how they attend.

    sink_N: learned logits that take part in every softmax; None: there are none.
    """

    query_bNQD: Tensor
    key_bHQD: Tensor
    value_bHQD: Tensor
    scaling: float
    softcap: float
    sink_N: Tensor | None = None

    @property
    def logits(self) -> Logits:
        """How their logits follow from products."""
        return Logits(self.scaling, self.softcap)

    def of(self, place: int) -> Tokens:
        """Those of one sequence, by its place among these."""
        return self.with_states(*(x[place : place + 1] for x in self.states))

    def part(self, start: int, end: int) -> Tokens:
        """The tokens from number `start` on and before `end`."""
        return self.with_states(*(x[:, :, start:end] for x in self.states))

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Their queries, keys and values."""
        return self.query_bNQD, self.key_bHQD, self.value_bHQD

    def with_states(self, query: Tensor, key: Tensor, value: Tensor) -> Tokens:
        """Other tokens that attend alike."""
        return self._replace(query_bNQD=query, key_bHQD=key, value_bHQD=value)
