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


def score(logits_TY: Tensor, answer: Sequence[int], full_TY: Tensor | None = None) -> Score:
    """The score of the logits that precede each token of the answer.

    full_TY: those of the full cache, where they are known.
    """
    logits_TY = logits_TY.float()
    answer_T = torch.tensor(list(answer), device=logits_TY.device)
    best_T = logits_TY.argmax(-1)
    right_T = best_T == answer_T
    log_TY = logits_TY.log_softmax(-1)
    nll = -log_TY.gather(1, answer_T[:, None]).mean()
    made = Score(float(right_T.all()), float(right_T.float().mean()), float(nll))
    if full_TY is None:
        return made
    log_full_TY = full_TY.float().log_softmax(-1)
    kl = (log_full_TY.exp() * (log_full_TY - log_TY)).sum(-1).mean().clamp_min(0)
    agreement = (full_TY.argmax(-1) == best_T).float().mean()
    return made._replace(kl=float(kl), agreement=float(agreement))


class Matched(NamedTuple):
    """A generated answer. exact: 1 if it is the right one, else 0. tokens: share at their place."""

    exact: float
    tokens: float


def matched(generated: Sequence[int], answer: Sequence[int]) -> Matched:
    """How much of an answer was generated; an end that came too early counts as wrong tokens."""
    right = sum(a == b for a, b in zip(generated, answer, strict=False)) / len(answer)
    return Matched(float(right == 1), right)


def leaked(said: str, secret: str, least: int = 3) -> float:
    """The share of a secret that was told: its longest run of characters that stands in a text.

    Runs of fewer than `least` characters are chance: any number shares a digit with another.
    """
    runs = (
        length
        for length in range(len(secret), least - 1, -1)
        if any(secret[i : i + length] in said for i in range(len(secret) - length + 1))
    )
    return next(runs, 0) / len(secret)
