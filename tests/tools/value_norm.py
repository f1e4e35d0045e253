"""Keep the values with the largest norm: the example of CONTRIBUTING.md.

1. The score of a token is ‖v‖₂ of its value, per KV head.
2. The last `recent` tokens stay, then the largest scores.

Differs from the paper: there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpress.policy import Budget, Policy, Slots, option


@dataclass(frozen=True, kw_only=True)
class ValueNorm(Policy):
    budget: Budget = option(0.5, "kept: fraction, tokens per row, or bytes per sequence")
    recent: int = option(8, "last tokens that always stay", low=0)

    def score(self, slots: Slots) -> Tensor:  # [B, H, S]; larger stays longer
        norm_BHS: Tensor = slots.value_BHSD.float().norm(dim=-1)
        return norm_BHS
