"""What was heard of requests, and the figures that follow from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Heard:
    """A request as its caller sees it. Times are those of `time.perf_counter`.

    arrived: when it was to arrive, whether somebody had time for it or not. begun: when it was
    taken up. times: of each token.
    """

    arrived: float
    begun: float = math.nan
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.times[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the one before."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Round:
    """All requests of one round. bytes_held: the most that caches held, or had reserved."""

    heard: list[Heard]
    bytes_held: int

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request."""
        return [one.tokens for one in self.heard]

    def figures(self) -> dict[str, float]:
        """Seconds of the first token and of a token after it, and how many ran at once."""
        first = [one.first for one in self.heard]
        gaps = [gap for one in self.heard for gap in one.gaps]
        return {
            "first_p50": percentile(first, 0.5),
            "first_p95": percentile(first, 0.95),
            "token_p50": percentile(gaps, 0.5),
            "token_p95": percentile(gaps, 0.95),
            "running": most_at_once([(one.begun, one.times[-1]) for one in self.heard]),
            "bytes_held": self.bytes_held,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """What a share of the values does not exceed, between two of them in proportion; NaN of none.

    Hyndman & Fan, 1996, definition 7: what NumPy does.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many of some spans of time overlap at most; one that ends makes room for the next."""
    steps = sorted([(end, -1) for _, end in spans] + [(begin, 1) for begin, _ in spans])
    now = most = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most


def spread(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Median, lowest and highest of each figure over the rounds; None for what none has."""
    made = {}
    for name in rounds[0]:
        values = [each[name] for each in rounds if not math.isnan(each[name])]
        middle = statistics.median(values) if values else None
        ends = {"low": min(values, default=None), "high": max(values, default=None)}
        made[name] = {"median": middle, **ends}
    return made
