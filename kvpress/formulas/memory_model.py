"""The memory model of arXiv 2512.00722: how long texts may grow, layer by layer.

    M_part = 1.3·(M_O + M_D) + 4·R·[(L_GPU + 1 + a)·S + L_CPU·B]·H·D

It foresees a whole model in 16 bits by five numbers, for orientation; what `attach(memory=)` plans
with is counted by the store, and measured (pipe/plan).
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

_OVERHEAD = Fraction(13, 10)  # of weights: what a run needs besides
_BYTES = 4  # of a channel: a key and a value, of two bytes each


class MemoryModel(NamedTuple):
    """What the model counts with. weights: bytes of the model, and of what drafts or retrieves."""

    weights: int
    requests: int  # R
    layers: int  # L
    heads: int  # H, KV heads
    width: int  # D
    budget: int  # B, tokens that an offloaded layer keeps on the device
    copies: int = (
        4  # a (the paper's alpha), for repeated keys and values: the query heads of a KV head
    )

    def bytes(self, tokens: int, away: int = 0) -> Fraction:
        """Bytes on the device for S tokens, with so many layers offloaded."""
        slots = (self.layers - away + 1 + self.copies) * tokens + away * self.budget
        return _OVERHEAD * self.weights + self._slot * slots

    def longest(self, memory: int, away: int) -> int:
        """S_j: the most tokens that fit with j layers offloaded; 0: not even one."""
        slots = (memory - _OVERHEAD * self.weights) / self._slot - away * self.budget
        return max(0, slots // (self.layers - away + 1 + self.copies))

    def thresholds(self, memory: int) -> list[int]:
        """S_0 … S_L: a text longer than S_j needs one more layer offloaded.

        They increase wherever the budget is below S_0.
        """
        return [self.longest(memory, away) for away in range(self.layers + 1)]

    @property
    def _slot(self) -> int:
        return _BYTES * self.requests * self.heads * self.width
