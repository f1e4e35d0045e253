"""A score of slots predicted from their keys and values by ridge regression (after KVzap, arXiv
2601.07891, which predicts from hidden states).

For each layer, y = ln max(s, 1e-5) for the scores s of all its KV heads, from x: the layer's keys
with their rotation undone, its values, the norm of each, and 1. Features are divided by their
standard deviation before λ counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.rotation import Rotation

LEAST_SCORE = 1e-5  # scores below are all the same
_ABOVE_ZERO = 1e-30  # of a prediction: a score of 0 means that there is none yet


class Sums(NamedTuple):
    """What a regression needs of its examples, fp64: sums of products, and how many there are.

    The last feature is 1, so that the last row of `square_XX` holds the sums of features.
    """

    square_XX: Tensor
    cross_XH: Tensor
    examples: int

    def plus(self, other: Sums) -> Sums:
        """The sums over the examples of both."""
        square_XX, cross_XH = self.square_XX + other.square_XX, self.cross_XH + other.cross_XH
        return Sums(square_XX, cross_XH, self.examples + other.examples)


def features(
    key_BHSD: Tensor, value_BHSE: Tensor, position_BHS: Tensor, rotation: Rotation | None
) -> Tensor:
    """What scores are predicted from: fp32 `[B, S, X]`, X = H·(D + 1) + H·(E + 1) + 1.

    Every row must hold the same tokens in the same order. rotation: None: keys carry no position.
    """
    key_BHSD, value_BHSE = key_BHSD.float(), value_BHSE.float()
    if rotation is not None:
        key_BHSD = rotation.turn(key_BHSD, -position_BHS)
    parts = [x.transpose(1, 2).flatten(2) for x in (key_BHSD, value_BHSE)]
    parts += [x.norm(dim=-1).mT for x in (key_BHSD, value_BHSE)]
    return torch.cat((*parts, torch.ones_like(parts[0][..., :1])), dim=-1)


def predict(
    key_BHSD: Tensor,
    value_BHSE: Tensor,
    position_BHS: Tensor,
    rotation: Rotation | None,
    weight_XH: Tensor,
) -> Tensor:
    """The scores s that a matrix predicts, above 0: fp32 `[B, H, S]`; of what `features` takes."""
    feature_BSX = features(key_BHSD, value_BHSE, position_BHS, rotation)
    log_BSH = feature_BSX @ weight_XH.to(feature_BSX.device)
    return log_BSH.mT.exp().clamp_min(_ABOVE_ZERO)


def sums(feature_SX: Tensor, score_HS: Tensor) -> Sums:
    """Of the slots of one text."""
    feature_SX = feature_SX.double()
    target_SH = score_HS.double().clamp_min(LEAST_SCORE).log().mT
    return Sums(feature_SX.mT @ feature_SX, feature_SX.mT @ target_SH, len(feature_SX))


def solve(given: Sums, penalty: float = 0.01) -> Tensor:
    """The matrix `[X, H]`, fp64, with which `features @ matrix` predicts ln s.

    penalty: λ in multiples of the mean of the diagonal, features having standard deviation 1.
    Features that never change are not scaled.
    """
    square_XX = given.square_XX / given.examples
    mean_X = square_XX[-1]
    variance_X = (square_XX.diagonal() - mean_X.square()).clamp_min(0)
    flat_X = variance_X <= 1e-12 * square_XX.diagonal()
    scale_X = torch.where(flat_X, 1.0, variance_X.sqrt())
    scaled_XX = square_XX / scale_X / scale_X[:, None]
    scaled_XX.diagonal().add_(penalty * scaled_XX.diagonal().mean())
    cross_XH = given.cross_XH / given.examples / scale_X[:, None]
    weight_XH: Tensor = torch.linalg.solve(scaled_XX, cross_XH)
    return weight_XH / scale_X[:, None]
