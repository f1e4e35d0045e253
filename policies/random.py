"""Evict tokens at random: the floor that every method must beat.

1. Each (layer, KV head, position) draws one uniform number from the seed, once and for all: what
   stays is a fair sample of all tokens. `draw=fresh` draws anew at every eviction: later tokens,
   which were drawn less often, are more likely to be there.
2. The largest numbers stay; the last `recent` tokens are protected.

With `protect=` for the prompt and a budget in tokens it is the baseline of arXiv 2609.03430, by
which policies that evict while decoding are to be judged.

Differs from the paper: which of both draws it means is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    draw: Literal["frozen", "fresh"] = option(
        "frozen", "once per token, or at every eviction", choices=("frozen", "fresh")
    )
    seed: int = option(0, "of the draw", low=0)

    def score(self, slots: Slots) -> Tensor:
        position_BHS = slots.position_BHS
        head_H = torch.arange(position_BHS.shape[1], device=position_BHS.device)
        head_H1 = head_H[:, None] + slots.first
        when = torch.full_like(head_H1, NO_QUERY)
        if self.draw == "fresh":
            when = slots.seen_B[:, None, None]
        return uniform(self.seed, slots.layer, head_H1, when, position_BHS)
