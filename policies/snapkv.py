"""Prompt tokens voted for by an observation window (Li et al., NeurIPS 2024, arXiv 2404.14469).

1. The last `window` queries of the prompt vote: their softmax attention is summed (section 4.2).
2. Votes are max-pooled over `pool` neighbouring tokens, so that details come with their context.
3. The best tokens of the prefix stay, and the window itself. Nothing is evicted while decoding.

Differs from the paper: votes are summed over the query group, and the KV head keeps one set (the
published code repeats the keys to query heads and stores those). Defaults are those of the code:
window 32, pool 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.policy import EMPTY, Budget, Observation, Policy, PolicyError, Slots, Step, option


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    window: int = option(32, "last queries that vote; their tokens always stay (code: 32)", low=1)
    pool: int = option(7, "width of the max-pooling in tokens, odd (code: 7)", low=1)
    sink: int = option(0, "first tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise PolicyError(f"pool={self.pool} must be odd, so that a window has a middle token.")

    @property
    def recent(self) -> int:
        return self.window

    def observe(self, step: Step) -> Observation:
        return Observation(window=self.window)

    def score(self, slots: Slots) -> Tensor:
        start_B11 = (slots.seen_B - self.window)[:, None, None]
        prefix_BHS = (slots.position_BHS < start_B11) & (slots.position_BHS != EMPTY)
        votes_BHS = torch.where(prefix_BHS, slots.observed_BHS, 0.0)
        return F.max_pool1d(votes_BHS, self.pool, stride=1, padding=self.pool // 2)
