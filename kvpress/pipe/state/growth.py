"""Quotas that grow while tokens are decoded, and how far the rows of a layer are from theirs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Change:
    """The quotas of the rows of a layer, as a growth last changed them."""

    quota_R: Tensor
    recent_R: Tensor
    version: int = 0  # how often they changed
    by: int | None = None  # slots that every row got in the last change; None: not all as many


@dataclass
class Growth:
    """Quotas that grow, of the rows of all layers one after the other.

    The first layer of a step makes them, the others find them; see pipe/growth.py.
    """

    portion_X: Tensor  # what rows keep of the tokens seen, fp64
    guarded_X: Tensor  # first tokens, and others, that are protected
    sequence_X: Tensor  # whose rows they are
    seen_B: Tensor | None = None  # tokens seen in the step that the quotas are of
    lasts: int = 0  # steps from there until a quota can be another
    sources: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # layer -> made of these
    changes: dict[int, Change] = field(default_factory=dict)  # layer -> its quotas

    def holds(self, layer: int, *sources: Tensor) -> bool:
        """Whether these are the tensors that the quotas of a layer were made of."""
        known = self.sources.get(layer, ())
        return len(known) == len(sources) and all(map(operator.is_, known, sources))

    def take(self, quota_X: Tensor, recent_X: Tensor) -> None:
        """Hands new quotas to the layers of which some row has another one than before."""
        changes = list(self.changes.values())
        sizes = [len(change.quota_R) for change in changes]
        more_X = quota_X - torch.cat([change.quota_R for change in changes])
        low, high = (int(x) for x in more_X.aminmax())
        recents = torch.cat([change.recent_R for change in changes])
        if low == high == 0 and torch.equal(recents, recent_X):
            return
        parts = (torch.split(x, sizes) for x in (quota_X, recent_X))
        for change, quota_R, recent_R in zip(changes, *parts, strict=True):
            change.quota_R, change.recent_R, change.by = quota_R, recent_R, low
            change.version += 1
        if low != high:
            for change, more_R in zip(changes, torch.split(more_X, sizes), strict=True):
                low, high = (int(x) for x in more_R.aminmax())
                change.by = low if low == high else None


class Excess:
    """By how many slots rows are above their quotas, followed from step to step.

    Asking the counts of all rows costs a decode step as much as three of its tensors.
    """

    def __init__(self) -> None:
        self.most: int | None = None  # of the fullest row, seen from its quota; None: not known
        self._least = 0  # of the emptiest one
        self.change: Change | None = None  # that the quotas are of, once a step needed it
        self.grown = -1  # its version

    def forget(self) -> None:
        """Rows or quotas changed in a way that is not followed."""
        self.most = None

    def measure(self, counts_R: Tensor, quota_R: Tensor) -> int:
        """Asks all rows: of the fullest one, seen from its quota; negative: it is below."""
        low, high = (counts_R - quota_R).aminmax()
        self.most, self._least = int(high), int(low)
        return self.most

    def quotas_grew(self, change: Change) -> None:
        """The quotas are now those of a change."""
        follows = self.change is change and self.grown == change.version - 1
        if self.most is not None and follows and change.by is not None:
            self.most, self._least = self.most - change.by, self._least - change.by
        else:
            self.most = None
        self.change, self.grown = change, change.version

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
