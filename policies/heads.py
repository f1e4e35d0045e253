"""Budgets for every layer and KV head, found once per model, for any policy that scores.

1. On a few texts, the best slots of all layers and heads together are chosen by how much a
   repetition of the text attends to them, for fractions from 1/64 to 3/4; F(f) is the share of its
   tokens that a row keeps of the fraction f: the mean of the texts, on lines between fractions.
2. A budget f gives a row the part F(f) of the tokens, and at least `least`·f. While decoding, rows
   grow in proportion.

F comes from a file of `kvpress calibrate heads`; nothing is guessed for a model that has none.

Differs from the paper: there is none of this form; budgets profiled offline are those of LU-KV
(arXiv 2602.08585).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpress.policy import Calibrated, Policy, Room, option, shares


@dataclass(frozen=True, kw_only=True)
class Heads(Policy):
    calibration: str | None = option(
        None, "file of `kvpress calibrate heads`; none: the one that ships for the model"
    )
    least: float = option(0.02, "part of an equal budget that every row keeps", low=0, high=1)

    @property
    def calibrated(self) -> Calibrated:
        return Calibrated("heads", ("share_LHX",), self.calibration)

    def allocate(self, room: Room) -> Tensor:
        fraction = min(1.0, room.slots / room.seen)
        share_LH = shares.at(room.calibrated["share_LHX"], fraction)
        share_LH = share_LH.clamp_min(self.least * fraction)
        return room.slots * share_LH / share_LH.mean()
