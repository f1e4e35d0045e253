"""Attention sinks and a recent window (Xiao et al., ICLR 2024, arXiv 2309.17453).

1. The first `sink` tokens stay (section 3.2: four suffice).
2. The rest of the budget holds the most recent tokens.

Differs from the paper: kept keys keep the position they had in the text; the paper re-indexes
positions inside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Budget, Policy, Rank, option


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (paper: 4)", low=0)
    interval: int = option(
        1, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )

    @property
    def rank(self) -> Rank:
        return "position"
