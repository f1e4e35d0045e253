"""Heavy hitters: accumulated attention plus a recent window (Zhang et al., NeurIPS 2023, arXiv
2306.14048).

1. f_j is the attention that token j received from every query so far, prompt and decode (section
   4.1).
2. `recent_ratio` of the budget holds the last tokens, the rest the largest f of the others
   (Algorithm 1).
3. After each decoded token what is over the budget is evicted; an evicted token's f is gone.

Differs from the paper: a fraction is of all tokens seen; the paper's is of the prompt for good
(`budget=0.5prompt`), so that one token goes after each decoded one. With grouped queries f is
summed over the group and each KV head keeps its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpress.policy import Budget, Observation, Policy, Rank, Step, option


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    accumulates: ClassVar[bool] = True
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int | None = option(None, "last tokens that always stay; none: recent_ratio", low=0)
    recent_ratio: float = option(
        0.5, "share of the budget for the last tokens (paper: 0.5)", low=0, high=1
    )
    interval: int = option(
        1, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )

    @property
    def rank(self) -> Rank:
        return "mass"

    def observe(self, step: Step) -> Observation:
        return Observation()
