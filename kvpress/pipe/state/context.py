"""What the layers of one cache share, and what is handed to them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.formulas.rotation import Rotation
from kvpress.host import lasting
from kvpress.pipe.state.meter import Meter
from kvpress.policy.budget import Geometry, Quota
from kvpress.policy.recipe import Recipe
from kvpress.policy.sparsity import Thresholds


@dataclass
class Growth:
    """Quotas that grow while decoding. Layers whose quotas are alike share one.

    The first of them makes the quotas of a step, the others find them; see `quotas.py`.
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
    recent_B: Tensor = field(default_factory=lambda: host.zeros(0))
    least: int = 0  # slots by which every row came to keep more in the last change
    most: int = 0  # slots by which a row did at the most


@dataclass
class Run:
    """What the layers of one cache share."""

    recipe: Recipe
    layers: int  # compressed layers
    page_slots: int
    horizon: int
    meter: Meter
    notes: dict[str, None]  # an ordered set of lines for the report
    cache_dtype: torch.dtype | None = None  # of stored keys and values; None: the model's
    newest: tuple[Tensor, Tensor] | None = None  # tokens seen before the last step, and after it
    recording: bool = False  # whether drafted tokens may be taken back until the next forward pass
    announced: int | None = None  # drafted tokens of this pass, where that is known
    members: list[Any] = field(default_factory=list)  # the layers that share this
    rotations: tuple[Rotation | None, ...] = ()  # of the keys of every layer, where needed
    thresholds: Thresholds | None = None  # of blocks of prompt attention, where it is sparse
    bytes_peak: int = 0  # the most that was held so far; see `Report`
    noted_at: int = -1  # logical length at which a layer last gave something back
    growths: dict[Hashable, Growth] = field(default_factory=dict)  # by what makes quotas alike
    broken: int | None = None  # the layer in which a pass is under way, or failed

    def drafted(self, tokens: int, first: bool) -> int:
        """How many of the tokens of this forward pass may be taken back; by default all or none."""
        default = 0 if first else tokens
        return default if self.announced is None else min(self.announced, tokens)

    def note_peak(self, more: int = 0) -> None:
        """Notes what all layers hold now, and `more` bytes, if that is the most so far."""
        held = sum(layer.bytes_held for layer in self.members) + more
        self.bytes_peak = max(self.bytes_peak, held)

    def one_more(self, seen_B: Tensor) -> Tensor:
        """`seen_B + 1`, one tensor for all layers, since they see the same tokens."""
        if self.newest is not None:
            before_B, after_B = self.newest
            if before_B is seen_B or torch.equal(before_B, seen_B):
                return after_B
        self.newest = (seen_B, _next(seen_B))
        return self.newest[1]


@lasting
def _next(seen_B: Tensor) -> Tensor:
    return seen_B + 1
