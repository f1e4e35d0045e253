"""Token omission via attention (Oren et al., EMNLP 2024, arXiv 2401.06104).

1. The score of a token is its attention weight from the last query alone, averaged over all heads
   (section 3.2).
2. All heads of a layer keep the same tokens: the largest scores.

Differs from the paper: the newest token always stays (`recent=1`); in the paper it can be dropped
at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpress.policy import Budget, Observation, Policy, Slots, Step, option


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    joins_heads: ClassVar[bool] = True
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(1, "last tokens that always stay", low=0)
    interval: int = option(
        1, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )

    def observe(self, step: Step) -> Observation:
        return Observation(window=1)

    def score(self, slots: Slots) -> Tensor:
        # Slot order must be the same in all heads: sort by position, average, and sort back.
        order_BHS = slots.position_BHS.argsort(dim=-1, stable=True)
        sorted_BHS = slots.observed_BHS.gather(-1, order_BHS)
        mean_B1S = slots.of_all_heads(sorted_BHS).mean(1, keepdim=True)
        mean_BHS = mean_B1S[..., : sorted_BHS.shape[2]].expand_as(sorted_BHS)
        return mean_BHS.new_empty(mean_BHS.shape).scatter_(-1, order_BHS, mean_BHS)
