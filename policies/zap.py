"""What a repetition of the context would attend to, predicted from keys and values (after KVzap,
arXiv 2601.07891).

1. A ridge regression per layer predicts ln s of every KV head, s being the score of `kvzip`, from
   the keys of the layer with their rotation undone, its values, and the norms of both.
2. Tokens are scored once, with the prompt that they come in or after; the largest scores stay. One
   pass, no second look.

Differs from the paper: the regression reads keys and values (there: hidden states), is found on
three texts in a minute (there: on a large set), and a budget is met (there: a threshold). Its
matrices come from a file of `kvpress calibrate heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpress.policy import (
    EMPTY,
    Budget,
    Calibrated,
    Need,
    Policy,
    Rank,
    Slots,
    gather,
    option,
    ridge,
)


@dataclass(frozen=True, kw_only=True)
class Zap(Policy):
    accumulates: ClassVar[bool] = True
    accumulates_steps: ClassVar[bool] = False
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    calibration: str | None = option(
        None, "file of `kvpress calibrate heads`; none: the one that ships for the model"
    )
    sink: int = option(4, "first tokens that always stay", low=0)
    recent: int = option(1, "last tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )

    @property
    def calibrated(self) -> Calibrated:
        return Calibrated("heads", ("ridge_LXH",), self.calibration)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rotation"})

    @property
    def rank(self) -> Rank:
        return "mass"

    def accumulate(self, slots: Slots) -> Tensor:
        mass_BHS, position_BHS = slots.kept_mass_BHS, slots.position_BHS
        unscored_BHS = (mass_BHS == 0) & (position_BHS != EMPTY)
        new = int(unscored_BHS.sum(-1).max())
        # What is not scored yet is newer than all that is, and no row has lost any of it.
        newest_BHQ = position_BHS.topk(new, dim=-1).indices
        key_BHQD, value_BHQE = (gather(x, newest_BHQ) for x in (slots.key_BHSD, slots.value_BHSD))
        place_BHQ = position_BHS.gather(2, newest_BHQ)
        feature_BQX = ridge.features(key_BHQD, value_BHQE, place_BHQ, slots.rotation)
        weight_XH = slots.calibrated["ridge_LXH"].to(feature_BQX.device)
        score_BHQ = (feature_BQX @ weight_XH).mT.exp().clamp_min(1e-30)
        return torch.where(unscored_BHS, mass_BHS.scatter(2, newest_BHQ, score_BHQ), mass_BHS)
