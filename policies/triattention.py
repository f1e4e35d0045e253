"""Keys that the queries of this model look at from where they will be (TriAttention, arXiv
2604.04921).

1. Calibrated once per model: the mean q̄ of each head's queries, their rotation undone, and the mean
   length m of each of their rotary pairs.
2. The query 1, 2, 4, … `future` tokens ahead is q̄ turned to there: T is the mean of its products
   with a key. E = Σ (m − |q̄|)·|k| over the pairs is what queries are beside their mean.
3. T + E is standardised over the tokens of a row for each query head; the largest of a query group
   is the score. Slots are evicted every `interval` decoded tokens.

Differs from the paper: every KV head keeps a set of its own (one of its modes), prompts are evicted
from too (`protect=` keeps them whole); q̄ and m come from a file of `kvpress calibrate heads`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Budget, Calibrated, Need, Policy, Slots, leverage, option


@dataclass(frozen=True, kw_only=True)
class TriAttention(Policy):
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    calibration: str | None = option(None, "file of `kvpress calibrate heads`; none: as shipped")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(128, "decoded tokens between evictions (code: 128)", low=0)
    future: int = option(65536, "the farthest query, in tokens ahead (code: 65536)", low=1)
    beside: bool = option(True, "whether what queries are beside their mean counts")

    @property
    def calibrated(self) -> Calibrated:
        return Calibrated("heads", ("query_LND", "length_LNF"), self.calibration)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rotation"})

    def score(self, slots: Slots) -> Tensor:
        score_BHGS = self.raw(slots)
        held_BHS = (slots.position_BHS != EMPTY)[:, :, None].expand_as(score_BHGS)
        return leverage.standard(score_BHGS, held_BHS).amax(2)

    def raw(self, slots: Slots) -> Tensor:
        """T + E of every query head: fp32 `[B, H, G, S]`."""
        key_BHSD, turn = slots.key_BHSD.float(), slots.rotation
        batch, heads, _, width = key_BHSD.shape
        of = slots.calibrated["query_LND"], slots.calibrated["length_LNF"]
        mean_ND, length_NF = (x.to(key_BHSD.device) for x in of)
        ahead_BND = mean_ND.expand(batch, -1, -1)
        if turn is not None:  # the mean of the products is the product with the mean turned query
            power_P = torch.arange(self.future.bit_length(), device=key_BHSD.device)
            there_BP = slots.seen_B[:, None] - 1 + 2**power_P
            ahead_BND = ahead_BND @ turn.mean(there_BP, width)
        made_BHGS: Tensor = ahead_BND.reshape(batch, heads, -1, width) @ key_BHSD.mT
        if turn is not None and self.beside:
            own_NF = turn.lengths(mean_ND)
            pairs = own_NF.shape[-1]  # other layers may have more
            rest_HGF = (length_NF[:, :pairs] - own_NF).view(heads, -1, pairs)
            made_BHGS = made_BHGS + rest_HGF @ turn.lengths(key_BHSD).mT
        return made_BHGS
