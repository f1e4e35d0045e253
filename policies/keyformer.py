"""Key tokens by a Gumbel-noised score (Adnan et al., MLSys 2024, arXiv 2403.09054).

1. Noise is added to the logits: y_j = x_j + ζ_j, ζ_j ~ Gumbel(0, 1) (Eq. 4).
2. g_j = exp(y_j/τ) / Σ_m exp(y_m/τ) over the tokens still cached (Eq. 9); f_j += g_j for every
   query, prompt and decode (Algorithm 1). The attention output itself never sees noise or τ.
3. τ_t = τ_init + t·(τ_end − τ_init)/T for the t-th decoded token (Eq. 10); t = 0 for the whole
   prompt.
4. A row keeps its last w tokens and the k − w largest f of the others: a token that leaves the
   window competes with the old key tokens. While k stays, one goes after each decoded token.

Differs from the paper: a fraction is of all tokens seen, so that k grows; the paper's share of the
prompt is `budget=0.5prompt`. With grouped queries g is summed over the group. Noise is drawn for
every query and key ("fresh", what the published code ran and its tables show); Algorithm 1 as
written draws it once per token ("frozen"). The published code can never promote a token that leaves
the window; this policy can, as the paper says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpress.policy import Budget, NoiseKind, Observation, Policy, Rank, Step, option


@dataclass(frozen=True, kw_only=True)
class Keyformer(Policy):
    accumulates: ClassVar[bool] = True
    budget: Budget = option(
        0.5, "k: fraction, tokens per row, or bytes (paper: 0.5prompt to 0.7prompt)"
    )
    sink: int = option(0, "first tokens that always stay (paper: none)", low=0)
    recent: int | None = option(None, "w in tokens; none: recent_ratio", low=0)
    recent_ratio: float = option(0.3, "w as a share of k (paper: 0.2 to 0.3)", low=0, high=1)
    interval: int = option(1, "decoded tokens between evictions (paper: 1); 0: prompts only", low=0)
    tau_init: float = option(1.0, "temperature for the prompt (paper: 1)", low=0.01)
    tau_end: float = option(2.0, "temperature after `horizon` decoded tokens (paper: 2)", low=0.01)
    horizon: int | None = option(None, "T in tokens; none: max_new_tokens of the call", low=1)
    noise: NoiseKind = option("fresh", "Gumbel noise", choices=("fresh", "frozen", "none"))
    window: int | Literal["all"] = option(
        "all", "prompt queries that score: all, or the last W", low=1, choices=("all",)
    )
    normalise_age: bool = option(
        False, "rank by f divided by the number of queries that could see the token"
    )
    seed: int = option(0, "of the noise", low=0)

    @property
    def rank(self) -> Rank:
        return "mass_per_age" if self.normalise_age else "mass"

    def observe(self, step: Step) -> Observation:
        horizon = self.horizon or step.horizon
        tau = self.tau_init + min(step.decoded / horizon, 1.0) * (self.tau_end - self.tau_init)
        # The last W queries stand for all queries of the prompt: without the weight decode steps
        # would count n/W times as much.
        scored = step.new_tokens if self.window == "all" else min(self.window, step.new_tokens)
        return Observation(
            window=None if self.window == "all" else self.window,
            noise=self.noise,
            tau=tau,
            seed=self.seed,
            weight=step.new_tokens / scored,
        )
