"""Layer budgets by the variance of attention, and recall-and-merge of what is evicted (Wan et al.,
ICLR 2025, arXiv 2406.13035).

1. F_h is the variance over the tokens of what a query head's prompt attention gives them; v_l is
   the mean of F_h over the heads of a layer, scaled to [0, 1] by their least and largest. Layer l
   keeps L·ρ·softmax_l(−v_l) of the prompt (Eq. 5): more where attention is spread.
2. A row keeps its first `sink` tokens, its last ones, and the largest accumulated attention of the
   others, 3 of these for each recent one.
3. An evicted key meets its nearest kept key: u = max_c cos(k, k_c) (Eq. 8, 9). It is merged if u
   reaches τ, else dropped; τ_0 is the mean u of the first eviction, τ_t = β·max u + (1 − β)·τ_{t−1}
   (Eq. 10).
4. Merged keys and values weigh exp(u), the kept one e, divided by their sum (Eq. 11, 12).

Differs from the paper: ρ is of all tokens seen, not of the prompt (`budget=0.2prompt`). Each KV
head evicts and merges for itself, with one τ per sequence and layer. The mean budget is met exactly
(`exact_mean`). `mode=official_code` follows the published code: 1:1, weights u and 1 over their
number, τ from means (½, ½), ranks merged in all heads together, sinks as targets, layers 0, 1 and
L − 1 whole; it stores repeated keys, starts after the first decoded token and keeps τ between
texts, which this policy does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvpress.policy import EMPTY, Budget, KeyMerge, Merging, Observation, Policy, Rank, Step, option

PAPER = {"recent_ratio": 0.25, "beta": 0.7, "full_first": 0, "full_last": 0, "merge_sinks": False}
CODE = {"recent_ratio": 0.5, "beta": 0.5, "full_first": 2, "full_last": 1, "merge_sinks": True}


@dataclass(frozen=True, kw_only=True)
class D2O(Policy):
    accumulates: ClassVar[bool] = True
    modes: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER, "official_code": CODE}
    budget: Budget = option(0.2, "ρ, kept: fraction, tokens per row, or bytes (paper: 0.2prompt)")
    mode: str = option("paper", "whose rules and defaults", choices=("paper", "official_code"))
    sink: int = option(4, "first tokens that always stay (code: 4)", low=0)
    recent: int | None = option(None, "last tokens that always stay; none: recent_ratio", low=0)
    recent_ratio: float | None = option(None, "their share (paper: ¼, code: ½)", low=0, high=1)
    interval: int = option(1, "decoded tokens between evictions; 0: prompts only", low=0)
    layers: str = option("variance", "budgets of layers", choices=("variance", "uniform"))
    exact_mean: bool = option(True, "layers keep ρ on average, with those that are kept whole")
    least: float = option(0.01, "of a prompt that a layer keeps (code: 0.01)", low=0, high=1)
    full_first: int | None = option(
        None, "first layers kept whole (paper: 0, code: 2)", low=0, layers=True
    )
    full_last: int | None = option(
        None, "last layers kept whole (paper: 0, code: 1)", low=0, layers=True
    )
    alpha: float | None = option(None, "of τ_{t−1}; none: 1 − β", low=0, high=1)
    beta: float | None = option(None, "β (paper: 0.7, code: 0.5)", low=0, high=1)
    threshold: float | None = option(None, "τ for good; above 1 nothing is merged; none: moving")
    own: float = option(math.e, "weight of a kept token beside exp(u) (paper: e)", low=0)
    merge_keys: KeyMerge = option(
        "rotated",
        "as stored, turned to the position of the kept one first, or values alone",
        choices=("rotated", "unrotated", "values_only"),
    )
    merge_sinks: bool | None = option(None, "whether sinks are merged into (code: true)")
    count_bias: bool = option(False, "slots count as often as tokens were merged into them")

    @property
    def rank(self) -> Rank:
        return "mass"

    def observe(self, step: Step) -> Observation:
        return Observation()

    def demand(self, attention_BNS: Tensor, position_BHS: Tensor) -> Tensor:
        group = attention_BNS.shape[1] // position_BHS.shape[1]
        held_BNS = (position_BHS != EMPTY).repeat_interleave(group, 1)
        tokens_BN1 = held_BNS.sum(-1, keepdim=True)
        off_BNS = (attention_BNS - attention_BNS.sum(-1, keepdim=True) / tokens_BN1) * held_BNS
        spread_BN = off_BNS.square().sum(-1) / (tokens_BN1[..., 0] - 1).clamp_min(1)  # F_h
        low_B1, high_B1 = (x[:, None] for x in spread_BN.aminmax(dim=1))
        return ((spread_BN - low_B1) / (high_B1 - low_B1 + 1e-6)).mean(1)

    def share(self, demand_BL: Tensor) -> Tensor:
        # A layer that is not known yet may have the largest variance: most is left to the others.
        variance_BL = demand_BL.nan_to_num(nan=1.0)
        return (-variance_BL if self.layers == "variance" else 0 * variance_BL).exp()

    def absorb(self) -> Merging:
        paper, beta = self.mode == "paper", self.beta or 0.0
        alpha = 1 - beta if self.alpha is None else self.alpha
        return Merging(
            own=self.own,
            memory=alpha,
            gain=beta,
            fixed=self.threshold,
            largest=paper,
            normalised=paper,
            together=not paper,
            keys=self.merge_keys,
            sinks=bool(self.merge_sinks),
            counts=self.count_bias,
        )
