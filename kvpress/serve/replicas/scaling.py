"""How many replicas the work asks for, and when one is started or let go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

HIGH, LOW = 0.85, 0.3  # of the bytes that there are
LONGEST_WAIT = 10.0  # seconds that tokens may wait
UP_AFTER, DOWN_AFTER = 30.0, 600.0  # seconds for which the work must ask for it


class Pressure(NamedTuple):
    """Of all replicas that serve.

    share: bytes promised to requests, those that wait too, of all that there are; 0 without a cap.
    wait: seconds until the tokens that wait now were read and drawn.
    """

    serving: int
    share: float
    wait: float


def wanted(pressure: Pressure) -> int:
    """How many replicas the work asks for just now; at least one.

    Requests are no measure of it: their bytes differ by the budget and the length of each.
    """
    serving = max(pressure.serving, 1)
    high = max(pressure.share / HIGH, pressure.wait / LONGEST_WAIT)
    if high > 1:
        return max(math.ceil(serving * high), serving + 1)
    if pressure.share < LOW and pressure.wait < LOW * LONGEST_WAIT:
        return max(serving - 1, 1)
    return serving


@dataclass
class Scaling:
    """Follows what is wanted, one replica at a time, once it has lasted.

    least, most: replicas. count: that there are to be.
    """

    least: int
    most: int
    count: int = 0
    up_after: float = UP_AFTER
    down_after: float = DOWN_AFTER
    _more_since: float | None = None
    _less_since: float | None = None

    def __post_init__(self) -> None:
        self.count = self.count or self.least

    def step(self, pressure: Pressure, now: float) -> int:
        """How many there are to be. now: monotonic seconds."""
        asked = wanted(pressure)
        # While one starts, the work of the others says nothing of what is missing.
        settled = pressure.serving >= self.count
        more, less = settled and asked > self.count, asked < self.count
        self._more_since = (self._more_since or now) if more else None
        self._less_since = (self._less_since or now) if less else None
        if self._more_since is not None and now - self._more_since >= self.up_after:
            self._change(min(self.count + 1, self.most))
        elif self._less_since is not None and now - self._less_since >= self.down_after:
            self._change(max(self.count - 1, self.least))
        return self.count

    def _change(self, count: int) -> None:
        self.count, self._more_since, self._less_since = count, None, None
