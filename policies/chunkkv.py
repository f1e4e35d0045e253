"""Whole chunks stay or go, whoever scores (ChunkKV, Liu et al., arXiv 2502.00299).

1. Every `chunk` tokens are a chunk; protected tokens are none of it.
2. A chunk's score is the mean score of its slots, summed over the KV heads of the layer.
3. The best chunks stay, the same for all heads.

Combines with a policy that scores: `snapkv:budget=0.25+chunkkv`.

Differs from the paper: counts are exact. Of the last chunk that finds room the best slots stay, and
rows may have other budgets than their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Policy, Slots, keep_top, option


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Policy):
    joins_heads: ClassVar[bool] = True
    chunk: int = option(20, "tokens of a chunk (code: 20)", low=1)

    def select(
        self, slots: Slots, score_BHS: Tensor, protected_BHS: Tensor, keep_BH: Tensor
    ) -> Tensor:
        position_BHS = slots.position_BHS
        open_BHS = (position_BHS != EMPTY) & ~protected_BHS
        chunk_BHS = position_BHS.clamp_min(0) // self.chunk
        chunks = int(slots.seen_B.max()) // self.chunk + 1
        nothing_BHC = score_BHS.new_zeros(*score_BHS.shape[:2], chunks, dtype=torch.float64)
        given_BHS = score_BHS.double().clamp(-1e300, 1e300).where(open_BHS, 0.0)
        counts_BHC = nothing_BHC.scatter_add(2, chunk_BHS, open_BHS.double())
        mean_BHC = nothing_BHC.scatter_add(2, chunk_BHS, given_BHS) / counts_BHC.clamp_min(1)
        total_B1C = slots.of_all_heads(mean_BHC).sum(1, keepdim=True)
        # First by chunk, among the slots of one by their own scores: ranks, which fp32 holds.
        own_BHS = score_BHS.argsort(dim=-1, descending=True, stable=True)
        of_chunk_BHS = total_B1C.expand_as(mean_BHC).gather(2, chunk_BHS).gather(2, own_BHS)
        order_BHS = own_BHS.gather(2, of_chunk_BHS.argsort(dim=-1, descending=True, stable=True))
        rank_BHS = order_BHS.argsort(dim=-1)
        return keep_top(-rank_BHS.float(), position_BHS, protected_BHS, keep_BH)
