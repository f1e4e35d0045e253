"""Budgets for every layer and KV head, found once per model, for any policy that scores.

1. On a few texts, the best quarter of the slots of all layers and heads together is chosen by how
   much a repetition of the text attends to them; F is the share of its tokens that each row keeps.
2. A budget f gives a row the part clamp(c·F, least, 1) of the tokens, with the factor c for which
   the mean over all rows is f. While decoding, rows grow in proportion.

F comes from a file of `kvpress calibrate heads`; nothing is guessed for a model that has none.

Differs from the paper: there is none of this form; budgets profiled offline are those of LU-KV
(arXiv 2602.08585).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpress.policy import Calibrated, Policy, Room, option


@dataclass(frozen=True, kw_only=True)
class Heads(Policy):
    calibration: str | None = option(
        None, "file of `kvpress calibrate heads`; none: the one that ships for the model"
    )
    least: float = option(0.02, "part of an equal budget that every row keeps", low=0, high=1)

    @property
    def calibrated(self) -> Calibrated:
        return Calibrated("heads", self.calibration)

    def allocate(self, room: Room) -> Tensor:
        share_LH = room.calibrated["share_LH"].double()
        share_LH = share_LH.clamp_min(self.least * share_LH.mean())
        return room.slots * share_LH / share_LH.mean()
