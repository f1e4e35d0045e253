"""Budgets by score: rows compete for the slots of a layer, or of the model (AdaKV, arXiv
2407.11550).

1. Every row keeps `least` of an equal budget for its own best tokens (the safeguard; paper: 0.2).
2. The other slots of the scope go to the largest scores of all its rows.

Combines with a policy whose scores can be compared between rows: attention, not ranks.

Differs from the paper: the counts are exact (its rounding may keep fewer), KV heads compete rather
than query heads, and rows may compete over all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvpress.policy import Policy, Pool, option


@dataclass(frozen=True, kw_only=True)
class AdaKV(Policy):
    least: float = option(0.2, "share of an equal budget for a row's own best", low=0, high=1)
    scope: Literal["layer", "model"] = option(
        "layer", "what rows compete in (paper: layer)", choices=("layer", "model")
    )

    def compete(self) -> Pool:
        return Pool(self.scope, self.least)
