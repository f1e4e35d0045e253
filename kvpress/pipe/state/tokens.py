"""New tokens of a layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops import Logits


class Tokens(NamedTuple):
    """New tokens of some sequences of one layer, all real, and how they attend."""

    query_bNQD: Tensor
    key_bHQD: Tensor
    value_bHQD: Tensor
    scaling: float
    softcap: float

    @property
    def logits(self) -> Logits:
        """How their logits follow from products."""
        return Logits(self.scaling, self.softcap)

    def of(self, place: int) -> Tokens:
        """Those of one sequence, by its place among these."""
        query, key, value = (x[place : place + 1] for x in self[:3])
        return Tokens(query, key, value, self.scaling, self.softcap)

    def part(self, start: int, end: int) -> Tokens:
        """The tokens from number `start` on and before `end`."""
        query, key, value = (x[:, :, start:end] for x in self[:3])
        return Tokens(query, key, value, self.scaling, self.softcap)
