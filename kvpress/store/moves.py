"""What steps chose again, and what of the rest was loaded before they asked: counts of pages."""

from __future__ import annotations

from typing import NamedTuple


class Moves(NamedTuple):
    """Pages of some steps, exactly. Of what moves each page counts once, of rows once for each.

    adjacent: chosen by steps whose rows the step before had read too; again: those among them that
    it had chosen for the same row. missing: not on the device, but for loads that began before the
    step chose; ahead: those among them that such loads had brought or had on their way. vain: of
    such loads, that the step did not choose or that did not come.
    """

    adjacent: int = 0
    again: int = 0
    missing: int = 0
    ahead: int = 0
    vain: int = 0

    def plus(self, other: Moves) -> Moves:
        """Those of both."""
        return Moves(*(a + b for a, b in zip(self, other, strict=True)))
