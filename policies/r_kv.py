"""What the last queries look at and no other key says (R-KV, Cai et al., arXiv 2505.24133).

1. Every `interval` decoded tokens the last `recent` queries look at all older tokens: I is the
   softmax of the largest logit of a query group, mean over the queries, max-pooled over `pool`
   neighbours.
2. U is the softmax of the mean cosine of a key with all others; the latest copy of a key is not
   counted as one.
3. The largest `weight`·I − (1 − `weight`)·U stay, and the last `recent` tokens.

Differs from the paper: rows go back to their budget exactly, after prompts too; `protect=` keeps a
prompt whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.policy import EMPTY, Budget, Need, Policy, PolicyError, Slots, gather, option
from kvpress.policy import redundancy as of


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(8, "last tokens that always stay, whose queries look (code: 8)", low=1)
    interval: int = option(128, "decoded tokens between evictions (code: 128)", low=0)
    pool: int = option(7, "width of the max-pooling in tokens, odd (code: 7)", low=1)
    weight: float = option(0.1, "of what is looked at (code: 0.1)", low=0, high=1)
    alike: float = option(0.5, "cosine above which a key is a copy (code: 0.5)", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise PolicyError(f"pool={self.pool} must be odd, so that a window has a middle token.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"query"})

    @property
    def watched(self) -> int:
        return self.recent

    def score(self, slots: Slots) -> Tensor:
        place_BHS = slots.position_BHS.masked_fill(slots.position_BHS == EMPTY, 2**62)
        order_BHS = place_BHS.argsort(-1)  # while decoding slots come in any order
        place_BHS, key_BHSD = place_BHS.gather(2, order_BHS), gather(slots.key_BHSD, order_BHS)
        older_BHS = place_BHS < (slots.seen_B - self.recent)[:, None, None]
        query_BNQD, scaling, softcap = slots.queries
        last_BNQD = query_BNQD[:, :, -self.recent :]
        looked_BHS = of.looked_at(last_BNQD, key_BHSD, older_BHS, scaling, softcap)
        looked_BHS = F.max_pool1d(looked_BHS, self.pool, stride=1, padding=self.pool // 2)
        same_BHS = of.redundancy(key_BHSD, place_BHS < 2**62, self.alike)
        score_BHS = self.weight * looked_BHS - (1 - self.weight) * same_BHS
        return torch.empty_like(score_BHS).scatter_(2, order_BHS, score_BHS)
