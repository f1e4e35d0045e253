"""What the planner tries, in the order of the harm it does: the table of the folder of policies."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from kvpress.policy.loading import PACKAGE

BUDGET = "{tokens}"  # in a specification: the largest budget that fits


class Rung(NamedTuple):
    """A way to hold a cache. tiered: its pages go to the host or the disk where they must."""

    kind: str
    spec: str
    tiered: bool = False

    @property
    def searches(self) -> bool:
        """Whether its budget is found by what fits."""
        return BUDGET in self.spec

    def at(self, tokens: int) -> str:
        """The specification with a budget."""
        return self.spec.replace(BUDGET, str(tokens))


def ladder() -> tuple[Rung, ...]:
    """All of them, the harmless ones first."""
    rungs = importlib.import_module(PACKAGE).LADDER
    return tuple(Rung(*rung) for rung in rungs)
