"""Timing of alternatives side by side: every round runs each of them once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpress.errors import KVPressError

Call = Callable[[int], Any]  # takes the number of the round


class TimingError(KVPressError, ValueError):
    """A number of rounds that cannot be run."""


@dataclass(frozen=True)
class Samples:
    """Wall-clock seconds of one candidate, one value per round, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """Seconds of the slowest round."""
        return max(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds that a quarter and three quarters of the rounds stay below."""
        if self.count == 1:
            return self.low, self.high
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the rounds stay below."""
        if self.count == 1:
            return self.high
        return statistics.quantiles(self.seconds, n=20, method="inclusive")[-1]

    @property
    def count(self) -> int:
        """How many rounds were timed."""
        return len(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "median": self.median,
            "low": self.low,
            "quartiles": list(self.quartiles),
            "p95": self.p95,
            "high": self.high,
            "count": self.count,
            "seconds": self.seconds,
        }


def interleave(
    candidates: Mapping[str, Call],
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Samples]:
    """Seconds of every candidate over `rounds` rounds, after `warmup` rounds that are not timed.

    Each round runs every candidate once, in an order that rotates from round to round: what slows
    the machine down for a while slows all of them. A candidate gets the number of the round,
    warm-up included, so that it can take another copy of its data each time. `on_round` is called
    with that number after the round; `synchronize` waits for a device before and after each call.
    Raises TimingError.
    """
    if rounds < 1 or warmup < 0:
        raise TimingError(
            f"rounds={rounds} and warmup={warmup}: at least one round must be timed and the"
            " warm-up must not be negative. Raise them."
        )
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            taken = _time(candidates[name], number, synchronize)
            if number >= warmup:
                seconds[name].append(taken)
        if on_round is not None:
            on_round(number)
    return {name: Samples(values) for name, values in seconds.items()}


def _time(call: Call, number: int, synchronize: Callable[[], None] | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    # Kept until the clock has stopped, so that freeing it is not timed.
    result = call(number)
    if synchronize is not None:
        synchronize()
    taken = time.perf_counter() - start
    del result
    return taken
