"""What a repetition of the context would attend to, predicted from keys and values (after KVzap,
arXiv 2601.07891).

1. A ridge regression per layer predicts ln s of every KV head, s being the score of `kvzip`, from
   the keys of the layer with their rotation undone, its values, and the norms of both.
2. Tokens are scored once, with the prompt that they come in or after; the largest scores stay. One
   pass, no second look.
3. With a `threshold` (the paper's form) every row keeps what has a larger ln s, and its protected
   tokens: as many as there are. A budget beside it is the most that stays of the whole model.

Differs from the paper: the regression reads keys and values (there: hidden states), is found on
three texts in a minute (there: on a large set), and a budget is met where no threshold is given.
Its matrices come from a file of `kvpress calibrate heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import ClassVar

import torch
from torch import Tensor

from kvpress.policy import (
    EMPTY,
    Budget,
    Calibrated,
    Need,
    Policy,
    Pool,
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
    joins_heads: ClassVar[bool] = True
    budget: Budget = option(
        None,
        "kept after prompts: fraction, tokens, or bytes; none: 0.5, or what the threshold says",
    )
    threshold: float | None = option(
        None, "ln s above which slots stay, at most as many as a budget given", low=-30, high=10
    )
    calibration: str | None = option(None, "file of `kvpress calibrate heads`; none: as shipped")
    sink: int = option(4, "first tokens that always stay", low=0)
    recent: int = option(1, "last tokens that always stay", low=0)
    interval: int = option(0, "decoded tokens between evictions", low=0, high=0)

    def __post_init__(self) -> None:
        if str(self.budget).lower() == "none":
            object.__setattr__(self, "budget", 0.5 if self.threshold is None else 1.0)
        super().__post_init__()

    def compete(self) -> Pool | None:
        if self.threshold is None:
            return None
        # Without another budget no row waits for what the others keep.
        return Pool("layer" if str(self.budget) == "1.0" else "model", above=exp(self.threshold))

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
        every = (slots.key_BHSD, slots.value_BHSD, position_BHS)
        of_all = [slots.of_all_heads(gather(x, newest_BHQ)) for x in every]
        weight_XH = slots.calibrated["ridge_LXH"]
        score_BHQ = ridge.predict(of_all[0], of_all[1], of_all[2], slots.rotation, weight_XH)
        return torch.where(unscored_BHS, mass_BHS.scatter(2, newest_BHQ, score_BHQ), mass_BHS)
