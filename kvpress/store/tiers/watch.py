"""Who waits in tiers, and who may watch them at work."""

from __future__ import annotations

from time import perf_counter
from typing import Protocol


class Stopwatch:
    """Adds up the seconds of its blocks, in which somebody waits."""

    def __init__(self) -> None:
        self.seconds, self._begin = 0.0, 0.0
        self.watcher: Watcher | None = None

    def __enter__(self) -> None:
        self._begin = perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += perf_counter() - self._begin
        if self.watcher is not None:
            self.watcher.note("wait", self._begin)


class Watcher(Protocol):
    """Told of everything that takes time, by whichever thread did it."""

    def note(self, what: str, begun: float, **facts: int) -> None:
        """Something began at `begun`, as `perf_counter` has it, and has ended now."""
