"""How right an answer is, from the logits under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """One answer.

    exact: 1 if greedy decoding gives all its tokens, else 0. tokens: the share of tokens that come
    out right when those before them are given. nll: mean negative log-likelihood of the answer, in
    nats per token. kl: mean Kullback–Leibler divergence of the next-token distribution from that of
    the full cache, in nats. agreement: share of tokens where both prefer the same.
    """

    exact: float
    tokens: float
    nll: float
    kl: float | None = None
    agreement: float | None = None


def score(logits_TV: Tensor, answer: Sequence[int], full_TV: Tensor | None = None) -> Score:
    """The score of the logits that precede each token of the answer.

    full_TV: those of the full cache, where they are known.
    """
    logits_TV = logits_TV.float()
    answer_T = torch.tensor(list(answer), device=logits_TV.device)
    best_T = logits_TV.argmax(-1)
    right_T = best_T == answer_T
    log_TV = logits_TV.log_softmax(-1)
    nll = -log_TV.gather(1, answer_T[:, None]).mean()
    made = Score(float(right_T.all()), float(right_T.float().mean()), float(nll))
    if full_TV is None:
        return made
    log_full_TV = full_TV.float().log_softmax(-1)
    kl = (log_full_TV.exp() * (log_full_TV - log_TV)).sum(-1).mean().clamp_min(0)
    agreement = (full_TV.argmax(-1) == best_T).float().mean()
    return made._replace(kl=float(kl), agreement=float(agreement))
