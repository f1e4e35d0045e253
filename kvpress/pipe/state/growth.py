"""Quotas that grow while tokens are decoded, and how far the rows of a layer are from theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvpress import host
from kvpress.policy.budget import Geometry, Quota


@dataclass
class Growth:
    """Quotas that grow. Layers whose quotas are alike share one.

    The first of them makes the quotas of a step, the others find them; see stages/allocate.py.
    """

    portion_b: tuple[float, ...]  # of the budget, in each sequence
    shape: Geometry  # of the layer that needed it first
    seen_B: Tensor | None = None  # tokens seen in the step that the quotas are of
    lasts: int = 0  # steps from there until a quota can be another
    version: int = 0  # how often they changed
    span_b: list[range] = field(default_factory=list)  # tokens seen for which each quota holds
    quotas: list[Quota] = field(default_factory=list)  # of each sequence
    slots: list[list[int]] = field(default_factory=list)  # of its KV heads
    quota_R: Tensor = field(default_factory=lambda: host.zeros(0))
    recent_R: Tensor = field(default_factory=lambda: host.zeros(0))
    least: int = 0  # slots by which every row came to keep more in the last change
    most: int = 0  # slots by which a row did at the most


class Excess:
    """By how many slots rows are above their quotas, followed from step to step.

    Asking the counts of all rows costs a decode step as much as three of its tensors.
    """

    def __init__(self) -> None:
        self.most: int | None = None  # of the fullest row, seen from its quota; None: not known
        self._least = 0  # of the emptiest one
        self.growth: Growth | None = None  # of the quotas, once a step needed it
        self.grown = -1  # the version of `growth` that the quotas are

    def forget(self) -> None:
        """Rows or quotas changed in a way that is not followed."""
        self.most = None

    def measure(self, counts_R: Tensor, quota_R: Tensor) -> int:
        """Asks all rows: of the fullest one, seen from its quota; negative: it is below."""
        low, high = (counts_R - quota_R).aminmax()
        self.most, self._least = int(high), int(low)
        return self.most

    def quotas_grew(self, growth: Growth) -> None:
        """The quotas are now those of a growth."""
        known = self.most is not None and self.grown == growth.version - 1
        if known and (self.most == self._least or growth.least == growth.most):
            assert self.most is not None, "just checked"
            self.most, self._least = self.most - growth.least, self._least - growth.most
        else:
            self.most = None
        self.grown = growth.version

    def step(self, evicted: bool) -> bool:
        """Every row got a slot; where something was evicted, rows above their quotas lost one.

        Returns whether all of them did.
        """
        everywhere = evicted and self._least == self.most
        if self.most is not None:
            self.most, self._least = self.most + 1, self._least + 1
        if evicted:
            self.most, self._least = 0, min(self._least, 0)
        return everywhere
