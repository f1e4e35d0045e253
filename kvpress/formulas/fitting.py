"""Slots that stay, fitted to what all slots gave (after Zweiger et al., arXiv 2602.16284).

Of one row: M reference queries, S slots of which K stay and may be changed, and others that stay as
they are. With the softmax weights P of the queries over all slots, a is the mass of the slots that
stay as they are and A their output. The K slots get weights B = e^β with P_K B ≈ 1 − a, and then
values C with (A + P_K B C) / (a + P_K B) ≈ P V: what the whole attention gave.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 1 << 21  # of softmax weights that are there at once
_STEPS = 40  # of the projected gradient
_POWER = 12  # iterations for the largest eigenvalue
_ABOVE = 1.02  # the largest eigenvalue is known from below
_NOTHING = 1e-30  # no mass at all


class Seen(NamedTuple):
    """What M queries of a row see of K slots, of those that go, and of the others.

    weight_MK: softmax weights over all slots of those that may be changed. mass_M: of these and of
    the slots that go. rest_M, rest_ME: mass of those that stay as they are, and their weighted
    values. out_ME: the output over all slots.
    """

    weight_MK: Tensor
    mass_M: Tensor
    rest_M: Tensor
    rest_ME: Tensor
    out_ME: Tensor

    def of(self, index_m: Tensor) -> Seen:
        """What some of the queries see."""
        return Seen(*(x[index_m] for x in self))

    def alone(self) -> Seen:
        """The same of the slots that may go, as if the others were not there: shares of 1."""
        mass_M1 = self.mass_M.clamp_min(_NOTHING)[:, None]
        out_ME, none_M = (self.out_ME - self.rest_ME) / mass_M1, torch.zeros_like(self.mass_M)
        ones_M = self.mass_M / mass_M1[:, 0]
        return Seen(self.weight_MK / mass_M1, ones_M, none_M, torch.zeros_like(out_ME), out_ME)

    def output(self, times_K: Tensor, value_KE: Tensor) -> Tensor:
        """The output `[M, E]` with so many times the weight and these values."""
        weight_MK = self.weight_MK * times_K
        mass_M1 = (self.rest_M + weight_MK.sum(1)).clamp_min(_NOTHING)[:, None]
        return (self.rest_ME + weight_MK @ value_KE) / mass_M1

    def error(self, times_K: Tensor, value_KE: Tensor) -> float:
        """The squared distance of that from what it was."""
        return float((self.output(times_K, value_KE) - self.out_ME).square().sum())


def see(
    query_MD: Tensor,
    slots: tuple[Tensor, Tensor],
    free_S: Tensor,
    rest_S: Tensor,
    logits: tuple[float, float],
    sink_M: Tensor | None = None,
) -> Seen:
    """What queries see of the keys and values `[S, D]`, `[S, E]` of a row: fp32.

    free_S: slots that stay and may be changed. rest_S: those that stay as they are. logits: scaling
    and softcap. sink_M: learned logits that take part in the softmax of each query.
    """
    key_SD, value_SE = (x.float() for x in slots)
    scaling, softcap = logits
    step, made = max(1, _ELEMENTS // max(1, len(key_SD))), []
    for start in range(0, len(query_MD), step):
        logit_mS = query_MD[start : start + step].float() @ key_SD.mT * scaling
        if softcap:
            logit_mS = torch.tanh(logit_mS / softcap) * softcap
        if sink_M is not None:
            logit_mS = torch.cat([logit_mS, sink_M[start : start + step, None].float()], dim=1)
        weight_mS = logit_mS.softmax(1)
        sunk_m = 0.0 if sink_M is None else weight_mS[:, -1]
        weight_mS = weight_mS[:, : len(key_SD)]
        rest_mR, part_mP = weight_mS[:, rest_S], weight_mS[:, ~rest_S]
        rest = (rest_mR.sum(1) + sunk_m, rest_mR @ value_SE[rest_S])
        out_mE = rest[1] + part_mP @ value_SE[~rest_S]
        made.append(Seen(weight_mS[:, free_S], part_mP.sum(1), *rest, out_mE))
    return Seen(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def fit_weights(seen: Seen, bounds: tuple[float, float], ridge: float) -> Tensor:
    """Weights `B_K` within bounds with which K slots have the mass of all that may go."""
    return bounded_least_squares(seen.weight_MK, seen.mass_M, bounds, ridge)


def fit_values(seen: Seen, times_K: Tensor, value_KE: Tensor, ridge: float) -> Tensor:
    """Values `[K, E]` of slots of these weights, with which the output is what it was."""
    weight_MK = seen.weight_MK * times_K
    mass_M1 = (seen.rest_M + weight_MK.sum(1)).clamp_min(_NOTHING)[:, None]
    wanted_ME = seen.out_ME - seen.rest_ME / mass_M1
    return least_squares(weight_MK / mass_M1, wanted_ME, value_KE, ridge)


def bounded_least_squares(
    factor_MK: Tensor, wanted_M: Tensor, bounds: tuple[float, float], ridge: float
) -> Tensor:
    """The `x_K` within bounds that minimises |F x − y|² + ridge·|F|²·|x − 1|².

    The unbounded solution is cut to the bounds; accelerated projected gradients go on from there.
    """
    largest = _largest(factor_MK)
    own_K = factor_MK.new_ones(factor_MK.shape[1])
    start = least_squares(factor_MK, wanted_M[:, None], own_K[:, None], ridge)[:, 0]
    x_K = ahead_K = start.clamp(*bounds)
    step, penalty, speed = 1 / ((_ABOVE + ridge) * largest), ridge * largest, 1.0
    for _ in range(_STEPS):
        slope_K = factor_MK.mT @ (factor_MK @ ahead_K - wanted_M) + penalty * (ahead_K - 1)
        next_K = (ahead_K - step * slope_K).clamp(*bounds)
        faster = (1 + (1 + 4 * speed * speed) ** 0.5) / 2
        ahead_K = next_K + (speed - 1) / faster * (next_K - x_K)
        x_K, speed = next_K, faster
    return x_K


def least_squares(factor_MK: Tensor, wanted_ME: Tensor, own_KE: Tensor, ridge: float) -> Tensor:
    """The `x_KE` that minimises |F x − y|² + ridge·|F|²·|x − own|²; |F|: the spectral norm.

    By the normal equations of the smaller side. Without a ridge they get a tiny one, so that slots
    that are seen alike, or more slots than queries, give numbers.
    """
    missing_ME = wanted_ME - factor_MK @ own_KE
    tiny = 8 * torch.finfo(factor_MK.dtype).eps
    penalty = max(ridge, tiny) * max(_largest(factor_MK), _NOTHING)
    if factor_MK.shape[0] < factor_MK.shape[1]:
        square_MM = factor_MK @ factor_MK.mT
        square_MM.diagonal().add_(penalty)
        return own_KE + factor_MK.mT @ _solve(square_MM, missing_ME)
    square_KK = factor_MK.mT @ factor_MK
    square_KK.diagonal().add_(penalty)
    return own_KE + _solve(square_KK, factor_MK.mT @ missing_ME)


def _solve(square_XX: Tensor, wanted_XE: Tensor) -> Tensor:
    factor_XX, failed = torch.linalg.cholesky_ex(square_XX)
    if bool(failed):  # rounding made it indefinite: it has a ridge, but a tiny one
        made: Tensor = torch.linalg.lstsq(square_XX, wanted_XE).solution
        return made
    made = torch.cholesky_solve(wanted_XE, factor_XX)
    return made


def _largest(factor_MK: Tensor) -> float:
    """The largest eigenvalue of FᵀF, from below; F has no negative numbers."""
    vector_K = factor_MK.new_ones(factor_MK.shape[1])
    found = 0.0
    for _ in range(_POWER):
        vector_K = factor_MK.mT @ (factor_MK @ (vector_K / vector_K.norm().clamp_min(_NOTHING)))
        found = float(vector_K.norm())
    return max(found, _NOTHING)
