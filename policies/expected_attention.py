"""Keys that future queries are expected to attend to (Expected Attention, Devoto et al., arXiv
2510.00636).

1. The queries of the prompt, their rotation undone, have a mean μ and a covariance Σ for each query
   head; the first `sink` ones, which are unlike the others, are left out.
2. R is the mean rotation over the next `future` positions: μ̃ = Rμ, Σ̃ = RΣRᵀ.
3. A Gaussian query gives key k on average exp(z), z = s·μ̃·k + s²/2·kᵀΣ̃k. E is the softmax of z over
   all slots but the sinks, averaged over the query group; the score is E·‖v‖₂.

Differs from the paper: KV heads keep sets of their own; a cap of logits is not modelled. With
several prompts the queries are those of the last one. `exact` averages exp(z) over 16 positions
instead of the rotations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Budget, Need, Policy, Slots, expected, option

POSITIONS = 16  # future positions over which weights are averaged


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (code: 4)", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )
    future: int = option(512, "future positions that count (code: 512)", low=1)
    covariance: bool = option(True, "whether the spread of queries counts")
    values: bool = option(True, "whether weights are multiplied by the norms of values")
    exact: bool = option(False, "weights are averaged, not rotations: 16 times the work")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"query", "rotation"})

    def score(self, slots: Slots) -> Tensor:
        query_BNQD, scaling = slots.queries.query_BNQD, slots.queries.scaling
        seen_B1, new = slots.seen_B[:, None], query_BNQD.shape[2]
        position_BQ = seen_B1 - new + torch.arange(new, device=seen_B1.device)
        of = expected.moments(query_BNQD, position_BQ, slots.rotation, self.sink)
        step = max(1, self.future // POSITIONS) if self.exact else 1
        future_BP = seen_B1 + torch.arange(0, self.future, step, device=seen_B1.device)
        logits = expected.mixed_logits if self.exact else expected.expected_logits
        z_BNS = logits(of, slots.key_BHSD, future_BP, slots.rotation, scaling, self.covariance)
        open_BHS = (slots.position_BHS != EMPTY) & (slots.position_BHS >= self.sink)
        weight_BHS = expected.weights(z_BNS, open_BHS)
        return weight_BHS * slots.value_BHSD.float().norm(dim=-1) if self.values else weight_BHS
