"""Evict tokens at random: the floor that every method must beat.

1. Each (layer, KV head, position) draws one uniform number from the seed, once and for all.
2. The largest numbers stay; the last `recent` tokens are protected.

Differs from the paper: there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import NO_QUERY, Budget, Policy, Slots, option, uniform


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(1, "last tokens that always stay", low=0)
    interval: int = option(
        1, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )
    seed: int = option(0, "of the draw", low=0)

    def score(self, slots: Slots) -> Tensor:
        position_BHS = slots.position_BHS
        head_H = torch.arange(position_BHS.shape[1], device=position_BHS.device)
        head_H1 = head_H[:, None] + slots.first
        return uniform(
            self.seed, slots.layer, head_H1, torch.full_like(head_H1, NO_QUERY), position_BHS
        )
