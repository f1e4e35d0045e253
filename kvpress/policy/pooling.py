"""Budgets that rows share: what a policy that divides them is told, and how rows may compete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from kvpress.errors import PolicyError


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
    row keeps for its own best slots, as a safeguard.
    """

    scope: Literal["layer", "model"]
    least: float = 0.0

    def check(self) -> None:
        """Raises PolicyError."""
        if self.scope not in ("layer", "model") or not 0 <= self.least <= 1:
            raise PolicyError(
                f"{self} is no way to compete. scope is 'layer' or 'model', least is from 0 to 1."
            )
