"""Keys of directions of their own, and attention inside blocks (Compactor, Chari et al., arXiv
2507.08143).

1. The leverage of a slot: l = x (XᵀX + λ)⁻¹ xᵀ over the keys X of its row, their rotation undone
   and their mean taken off.
2. Every `block` tokens of the prompt attend to each other, later ones included; what a slot gets,
   times |v|, is averaged over 3 neighbours.
3. The score is a weighted sum of both, each standardised over the row.

Differs from the paper: leverages are exact (there: of a random sketch) with λ a share of the mean
diagonal; logits are scaled as the model scales them; a row is standardised alone, whatever stands
beside it in the batch. How much a context stands is not inferred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.policy import EMPTY, Budget, Need, Policy, Slots, gather, leverage, option


@dataclass(frozen=True, kw_only=True)
class Compactor(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(8, "first tokens that always stay (code: 8)", low=0)
    recent: int = option(4, "last tokens that always stay (code: 4)", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )
    block: int = option(256, "tokens that attend to each other (code: 256)", low=2)
    weight: float | None = option(
        None, "of leverages; none: the share that goes, of a budget in bytes 0.35", low=0
    )
    ridge: float = option(1e-3, "λ as a share of the mean diagonal", low=0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"query", "rotation"})

    def score(self, slots: Slots) -> Tensor:
        position_BHS, asked = slots.position_BHS, slots.queries
        held_BHS = position_BHS != EMPTY
        key_BHSD = slots.key_BHSD
        plain = slots.rotation.turn(key_BHSD, -position_BHS) if slots.rotation else key_BHSD
        own_BHS = leverage.leverage(plain, held_BHS, self.ridge)
        # The last tokens seen are those that the queries are of; no row has lost any of them.
        newest_BHQ = position_BHS.topk(asked.query_BNQD.shape[2], dim=-1).indices.flip(-1)
        block = (gather(key_BHSD, newest_BHQ), asked.scaling, asked.softcap, self.block)
        given_BHQ = leverage.within_blocks(asked.query_BNQD, *block)
        given_BHQ = given_BHQ * gather(slots.value_BHSD, newest_BHQ).float().norm(dim=-1)
        given_BHQ = F.avg_pool1d(given_BHQ, 3, stride=1, padding=1, count_include_pad=False)
        asked_BHS = torch.zeros_like(held_BHS).scatter(2, newest_BHQ, True)
        attention_BHS = torch.zeros_like(own_BHS).scatter(2, newest_BHQ, given_BHQ)
        attention_BHS = leverage.standard(attention_BHS, asked_BHS)
        return self._weight(slots) * leverage.standard(own_BHS, held_BHS) + attention_BHS

    def _weight(self, slots: Slots) -> Tensor:
        seen_B11 = slots.seen_B[:, None, None].float()
        if self.weight is not None or self.budget.unit == "bytes":
            return torch.full_like(seen_B11, 0.35 if self.weight is None else self.weight)
        kept = float(self.budget.amount) * (seen_B11 if self.budget.relative else 1.0)
        return 1 - (kept / seen_B11).clamp_max(1.0)
