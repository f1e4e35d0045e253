"""What decode steps read of compressed contexts, over the cells of a policy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Share(NamedTuple):
    """What `common.reads.StepReads` says, over contexts.

    read: bytes per step, of those of the full cache.
    """

    read: float
    tokens: float
    missed_mean: float | None
    missed_max: float | None

    @property
    def missed(self) -> str:
        """The mean and the largest, as texts."""
        if self.missed_mean is None or self.missed_max is None:
            return "–"
        return f"{self.missed_mean:.1%} ({self.missed_max:.0%})"


def share_of(reads: Sequence[Mapping[str, Any] | None], bytes_full: int) -> Share | None:
    """What cells say of their steps, together; None where some read everything.

    bytes_full: of the full caches of all of them.
    """
    known = [own for own in reads if own is not None]
    if len(known) < len(reads) or not known or not bytes_full:
        return None
    steps = sum(own["steps"] for own in known)
    certified = all(own["missed_max"] is not None for own in known)
    missed = sum((own["missed_mean"] or 0.0) * own["steps"] for own in known) / steps
    return Share(
        sum(own["bytes_read"] for own in known) / bytes_full,
        statistics.fmean(own["tokens_read"] for own in known),
        missed if certified else None,
        max(own["missed_max"] for own in known) if certified else None,
    )
