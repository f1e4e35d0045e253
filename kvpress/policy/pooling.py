"""Budgets that rows share: what a policy that divides them is told, and how rows may compete."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.policy.budget import Limits


class Calibrated(NamedTuple):
    """Tensors that a policy needs to know of a model, from a file of `kvpress calibrate`.

    kind: what was calibrated. names: the tensors, each with a part for every layer that has a
    budget. file: None: the one that ships for the model.
    """

    kind: str
    names: tuple[str, ...]
    file: str | None = None


class Room(NamedTuple):
    """What a policy may divide among the rows of one sequence.

    slots: what the budget gives to every row, on average. seen: tokens of the sequence. least:
    slots that each row keeps in any case, for protected tokens. heads: KV heads of every layer that
    has the budget. calibrated: what the policy needs to know of the model.
    """

    slots: int
    seen: int
    least: int
    heads: tuple[int, ...]
    calibrated: Mapping[str, Tensor] = {}


class Pool(NamedTuple):
    """Rows compete for slots by their scores, which then must be comparable between rows.

    scope: those of one layer, or of the whole model, which is compressed once a prompt has passed
    all of its layers: until then it is held whole. least: the share of an equal budget that every
    row keeps for its own best slots, as a safeguard. above: a slot without a larger score goes, if
    it is not protected, even where there is room: the budget is then the most that stays.
    """

    scope: Literal["layer", "model"]
    least: float = 0.0
    above: float = -math.inf

    def check(self) -> None:
        """Raises PolicyError."""
        known = self.scope in ("layer", "model") and self.above < math.inf
        if not known or not 0 <= self.least <= 1:
            raise PolicyError(
                f"{self} is no way to compete. scope is 'layer' or 'model', least is from 0 to 1,"
                " above is a score."
            )

    def check_beside(self, limits: Limits) -> None:
        """Raises PolicyError where a budget does not go with a least score."""
        if not thins(self):
            return
        if limits.interval:
            raise PolicyError(
                "A policy keeps slots by a threshold, which is met after prompts, but evicts while"
                f" decoding too (interval={limits.interval}). Give interval=0, or no threshold."
            )
        if limits.budget.unit == "bytes":
            raise PolicyError(
                "A policy keeps slots by a threshold, however many there are, but a budget in bytes"
                f" (budget={limits.budget}) is met in whole pages. Give a fraction or tokens as the"
                " most that stays, or no threshold."
            )


def thins(pool: Pool | None) -> bool:
    """Whether slots go although the budget has room for them: by their scores."""
    return pool is not None and pool.above > -math.inf
