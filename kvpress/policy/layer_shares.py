"""How the budget of a prompt is divided among the layers, given how much each one needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.errors import PolicyError

_HALVINGS = 60  # of the interval in which a factor lies: to the last bit


class Division(NamedTuple):
    """The bounds of what layers keep, as parts of a prompt.

    exact_mean: layers keep what the budget asks for on average, whatever the bounds do; otherwise
    what a bound takes or gives changes the average. least: of a prompt that a layer keeps at least.
    full_first, full_last: layers that are never compressed.
    """

    exact_mean: bool = True
    least: float = 0.0
    full_first: int = 0
    full_last: int = 0

    @classmethod
    def of(cls, policy: object) -> Division:
        """The bounds that a policy has among its options."""
        return cls(**{name: getattr(policy, name) for name in cls._fields if hasattr(policy, name)})

    def portions(self, weight_BL: Tensor, kept_B: Tensor, least_B: Tensor) -> Tensor:
        """What layers keep in multiples of the budget, by their weights: fp64 `[B, L]`.

        kept_B: the part of the prompt that the budget keeps. least_B: the part that every layer
        needs, besides `least`; where the average leaves less, all layers keep that. Infinite: never
        compressed. Raises PolicyError if no division has this average.
        """
        layers = weight_BL.shape[1]
        ratio_BL = kept_B[:, None] * weight_BL / weight_BL.mean(1, keepdim=True)
        compressed = slice(self.full_first, max(self.full_first, layers - self.full_last))
        part_BL = ratio_BL[:, compressed]
        if self.exact_mean:
            others = part_BL.shape[1]
            target_B = (layers * kept_B - (layers - others)) / max(others, 1)
            self._check(target_B, kept_B)
            least_B = torch.minimum(least_B.clamp_min(self.least), target_B)
            part_BL = _scaled(part_BL, target_B, least_B)
        else:
            least_B = least_B.clamp_min(self.least)
        portion_BL = torch.full_like(ratio_BL, math.inf)
        portion_BL[:, compressed] = _within(part_BL, least_B) / kept_B[:, None]
        return portion_BL

    def _check(self, target_B: Tensor, kept_B: Tensor) -> None:
        if bool((target_B < 0).any()):
            worst = int(target_B.argmin())
            raise PolicyError(
                f"Layers cannot keep {float(kept_B[worst]):.3f} of a prompt on average where"
                f" full_first={self.full_first} and full_last={self.full_last} of them are kept"
                " whole. Raise the budget, keep fewer layers whole, or set exact_mean=false."
            )


def _within(ratio_BL: Tensor, least_B: Tensor) -> Tensor:
    return ratio_BL.clamp_max(1).maximum(least_B[:, None])


def _scaled(ratio_BL: Tensor, target_B: Tensor, least_B: Tensor) -> Tensor:
    """The ratios times a factor with which they are `target_B` on average within the bounds."""
    if not ratio_BL.shape[1]:
        return ratio_BL
    plain_BL = ratio_BL * (target_B / ratio_BL.mean(1))[:, None]
    if bool(((plain_BL >= least_B[:, None]) & (plain_BL <= 1)).all()):
        return plain_BL
    low_B1, high_B1 = torch.zeros_like(ratio_BL[:, :1]), 1 / ratio_BL.amin(1, keepdim=True)
    for _ in range(_HALVINGS):
        factor_B1 = (low_B1 + high_B1) / 2
        mean_B1 = _within(factor_B1 * ratio_BL, least_B).mean(1, keepdim=True)
        above_B1 = mean_B1 > target_B[:, None]
        low_B1 = torch.where(above_B1, low_B1, factor_B1)
        high_B1 = torch.where(above_B1, factor_B1, high_B1)
    return high_B1 * ratio_BL
