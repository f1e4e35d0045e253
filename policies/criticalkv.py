"""Scores weighed by what a slot adds to the hidden state (CriticalKV, Feng et al., arXiv
2502.03805).

1. v̂ = |W v|: the norm of a slot's value behind its part of the output projection, averaged over
   the query group.
2. Of a row's budget the share `first` goes to the largest scores S, as they are.
3. The rest goes to the largest (S + 1e-4) · v̂.

Combines with a policy whose scores are shares of attention: `snapkv:budget=0.25+criticalkv`.

Differs from the paper: the norm is the Euclidean one, of Gram matrices that are made once per
model (published code: the sum of absolute values, 32 times the work).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Need, Policy, PolicyError, Slots, keep_top, option

LEAST = 1e-4  # that every slot's attention has at least, so that norms tell zeros apart


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Policy):
    first: float = option(0.5, "share of the budget that goes by scores alone", low=0, high=1)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"output"})

    def select(
        self, slots: Slots, score_BHS: Tensor, protected_BHS: Tensor, keep_BH: Tensor
    ) -> Tensor:
        held_BHS = slots.position_BHS != EMPTY
        if bool(((score_BHS < 0) & score_BHS.isfinite() & held_BHS).any()):
            raise PolicyError(
                "criticalkv multiplies scores with norms, but here are scores below 0. Combine it"
                " with a policy whose scores are shares of attention."
            )
        guarded_BH = (protected_BHS & held_BHS).sum(-1)
        by_score_BH = torch.minimum(keep_BH, guarded_BH + (self.first * keep_BH).long())
        best_BHS = keep_top(score_BHS, slots.position_BHS, protected_BHS, by_score_BH)
        batch, heads, width = score_BHS.shape
        norm_BHS = slots.output_norms_BNS.reshape(batch, heads, -1, width).mean(2)
        return keep_top((score_BHS + LEAST) * norm_BHS, slots.position_BHS, best_BHS, keep_BH)
