"""The time of every stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

STAGES = (
    "prefill attention",
    "second look",
    "observe",
    "select",
    "merge",
    "refit",
    "store",
    "format",
    "decode attention",
)


class Meter:
    """Seconds per stage of one cache. On a GPU events are recorded and read only when asked."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def stage(self, name: str, device: torch.device | None) -> AbstractContextManager[None]:
        """Adds the time of the block to a stage. device: where it runs, None for the host."""
        if device is not None and device.type == "cuda":
            return self._on_device(name)
        return _Stopwatch(self._seconds, name)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a stage what was measured elsewhere, of several caches at once."""
        self._seconds[name] += seconds

    @contextmanager
    def _on_device(self, name: str) -> Iterator[None]:
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far. Waits for the device."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


class _Stopwatch:
    """Adds the seconds of a block to an entry: a class, since it runs for every layer and token."""

    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start
