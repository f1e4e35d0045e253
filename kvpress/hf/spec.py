"""What an engine cache is made from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpress.formulas.rotation import Rotation
from kvpress.hf.support import Fingerprint
from kvpress.hf.wording import Wording
from kvpress.parallel import ALONE, Ranks
from kvpress.pipe.plan.plan import Plan
from kvpress.pipe.state.context import Context, Ledger
from kvpress.pipe.state.heap import Heap
from kvpress.pipe.state.outlook import Outlook
from kvpress.policy.heads import RetrievalHead
from kvpress.policy.pooling import Calibrated
from kvpress.policy.recipe import Recipe
from kvpress.policy.sparsity import Thresholds
from kvpress.store.tiers.tiers import Tiers

DEFAULT_HORIZON = 256  # new tokens assumed by schedules when nobody said how many will be generated


@dataclass
class Lease:
    """What a cache knows of the engine that made it. Copies of a cache share it.

    active: whether the engine is still attached. weights: tells which weights its model has.
    """

    active: bool = True
    weights: Callable[[], str] = lambda: ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self


@dataclass(frozen=True)
class CacheSpec:
    """What all caches of an engine have in common.

    page_slots: slots per page. cache_dtype: of stored keys and values; None: the model's.
    rotations: of the keys of every layer, where a policy needs them. thresholds: of blocks of
    prompt attention, where it is sparse. wording: what probes say, and how texts are
    written. calibrated: what policies need to know of the model. tiers: where old pages are,
    where they may be elsewhere than on the device. head: what says before the first layer which
    tokens a step reads, where a policy asks one. plan: what was chosen for `memory=`. ranks: the
    processes that hold the model together. grams: of the output projection of every layer, where a
    policy needs it.
    """

    fingerprint: Fingerprint
    recipe: Recipe
    page_slots: int
    lease: Lease
    cache_dtype: torch.dtype | None = None
    rotations: tuple[Rotation | None, ...] = ()
    thresholds: Thresholds | None = None
    wording: Wording = field(default_factory=Wording)
    calibrated: Mapping[Calibrated, Mapping[str, Tensor]] = field(default_factory=dict)
    tiers: Tiers | None = None
    head: RetrievalHead | None = None
    plan: Plan | None = None
    ranks: Ranks = ALONE
    grams: tuple[Tensor, ...] = ()

    @property
    def compressed(self) -> int:
        """Layers that have the policy's budget."""
        return sum(kind.window is None for kind in self.fingerprint.kinds)

    def context(self, horizon: int | None) -> Context:
        """What the layers of a new cache share. horizon: tokens to come; None: not known."""
        return Context(
            self.recipe,
            self.compressed,
            self.page_slots,
            horizon or DEFAULT_HORIZON,
            Ledger(notes=self.notes()),
            self.cache_dtype,
            self.rotations,
            self.thresholds,
            calibrated=self.calibrated,
            tiers=self.tiers,
            outlook=None if self.head is None else Outlook(self.head),
            heap=None if self.plan is None else Heap(),
            ranks=self.ranks,
            grams=self.grams,
        )

    def notes(self) -> dict[str, None]:
        """What the report of every cache says."""
        kinds = self.fingerprint.kinds
        sliding = len(kinds) - self.compressed
        planned: dict[str, None] = {} if self.plan is None else {str(self.plan): None}
        if not self.recipe.limits or not sliding:
            return planned
        window = max(kind.window or 0 for kind in kinds)
        return planned | {
            f"{sliding} of {len(kinds)} layers are sliding-window layers: they keep their window"
            f" ({window} tokens) and are not compressed by the policy.": None
        }

    def note(self, cache: object) -> None:
        """Tells tiers, if there are some, when a cache is gone."""
        if self.tiers is not None:
            weakref.finalize(cache, self.tiers.note_dropped).atexit = False

    def facts(self) -> dict[str, str | None]:
        """What a file and its reader must agree on."""
        return {
            "part": None if self.ranks.alone else str(self.ranks),
            "model": str(self.fingerprint),
            "weights": self.lease.weights(),
            "policy": str(self.recipe),
        }
