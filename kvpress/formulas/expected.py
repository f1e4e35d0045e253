"""What future queries will give to a key, from the mean and the spread of those that were
(Expected Attention, Devoto et al., arXiv 2510.00636).

A query at position p is R(p)·q, with q Gaussian of mean μ and covariance Σ. Its weight for a key k,
before the softmax, is on average exp(s·(R(p)μ)·k + s²/2·kᵀR(p)ΣR(p)ᵀk).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.rotation import Rotation


class Moments(NamedTuple):
    """Mean and covariance of the queries of each query head, in fp32."""

    mean_BND: Tensor
    covariance_BNDD: Tensor

    def through(self, turn_BDD: Tensor) -> Moments:
        """Those of queries `q @ turn`."""
        turn_B1DD = turn_BDD[:, None]
        mean_BND = (self.mean_BND[:, :, None] @ turn_B1DD)[:, :, 0]
        return Moments(mean_BND, turn_B1DD.mT @ self.covariance_BNDD @ turn_B1DD)


def moments(
    query_BNQD: Tensor, position_BQ: Tensor, rotation: Rotation | None, skip: int
) -> Moments:
    """Of queries with their rotation undone, without those of the first `skip` positions.

    rotation: None: queries carry no position. Divided by their number. Where none is left, all
    count.
    """
    query_BNQD = query_BNQD.float()
    if rotation is not None:
        query_BNQD = rotation.turn(query_BNQD, -position_BQ[:, None])
    counts_BQ = position_BQ >= skip
    counts_BQ = counts_BQ | ~counts_BQ.any(-1, keepdim=True)
    weight_BQ = counts_BQ.float() / counts_BQ.sum(-1, keepdim=True).float()
    weight_B1Q1 = weight_BQ[:, None, :, None]
    mean_BN1D = (query_BNQD * weight_B1Q1).sum(2, keepdim=True)
    apart_BNQD = query_BNQD - mean_BN1D
    return Moments(mean_BN1D[:, :, 0], (apart_BNQD * weight_B1Q1).mT @ apart_BNQD)


def logits(of: Moments, key_BHSD: Tensor, scaling: float, covariance: bool = True) -> Tensor:
    """The logarithm of a Gaussian query's mean weight for every key, up to none: `[B, N, S]`.

    covariance: False leaves the term of the second order out.
    """
    batch, heads, _, width = key_BHSD.shape
    key_BH1SD = key_BHSD.float()[:, :, None]
    mean_BHGD = of.mean_BND.reshape(batch, heads, -1, width)
    out_BHGS = scaling * (key_BH1SD @ mean_BHGD[..., None])[..., 0]
    if covariance:
        spread_BHGDD = of.covariance_BNDD.reshape(batch, heads, -1, width, width)
        out_BHGS = out_BHGS + scaling**2 / 2 * (key_BH1SD @ spread_BHGDD * key_BH1SD).sum(-1)
    return out_BHGS.flatten(1, 2)


def expected_logits(
    of: Moments,
    key_BHSD: Tensor,
    future_BP: Tensor,
    rotation: Rotation | None,
    scaling: float,
    covariance: bool = True,
) -> Tensor:
    """Those of queries at positions of their own, their rotations averaged beforehand (the paper).

    `[B, N, S]`. future_BP: the positions of the queries. key_BHSD: as stored, rotated.
    """
    if rotation is not None:
        of = of.through(rotation.mean(future_BP, key_BHSD.shape[-1]))
    return logits(of, key_BHSD, scaling, covariance)


def mixed_logits(
    of: Moments,
    key_BHSD: Tensor,
    future_BP: Tensor,
    rotation: Rotation | None,
    scaling: float,
    covariance: bool = True,
) -> Tensor:
    """The same where weights, not rotations, are averaged: one pass over the keys per position."""
    if rotation is None:
        return logits(of, key_BHSD, scaling, covariance)
    total = None
    for future_B in future_BP.unbind(1):
        turned_BHSD = rotation.turn(key_BHSD, -future_B[:, None, None])
        one = logits(of, turned_BHSD, scaling, covariance)
        total = one if total is None else torch.logaddexp(total, one)
    assert total is not None, "there is a future position"
    return total - math.log(future_BP.shape[1])


def weights(logits_BNS: Tensor, open_BHS: Tensor) -> Tensor:
    """Their softmax over open slots, averaged over each query group: fp32 `[B, H, S]`."""
    batch, heads, slots = open_BHS.shape
    logits_BHGS = logits_BNS.reshape(batch, heads, -1, slots)
    closed_BH1S = ~open_BHS[:, :, None]
    weight_BHGS = logits_BHGS.masked_fill(closed_BH1S, -torch.inf).softmax(-1)
    return weight_BHGS.nan_to_num().mean(2)  # a row without an open slot has no weights
