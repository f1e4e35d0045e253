"""Candidates side by side: each is made once, runs once per round, and leaves a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from kvpress.bench.common.journal import Row
from kvpress.bench.common.timing import Samples, interleave


class Measurement(Protocol):
    """The measurement of one candidate beside others."""

    def round(self, number: int) -> Any:
        """What is timed."""

    def settle(self, timed: bool) -> None:
        """What has to be done after a round of all candidates, and is not timed."""

    def row(self, taken: Samples) -> Row:
        """What was measured, in plain values."""


def run_rounds(
    starts: Mapping[str, Callable[[], Measurement]],
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Row]:
    """A row per candidate, with seconds over the rounds; see `timing.interleave`.

    A candidate that fails leaves a row with its error, and the others go on.
    """
    with torch.inference_mode():
        runners = {name: _Runner(start) for name, start in starts.items()}

        def settle(number: int) -> None:
            for runner in runners.values():
                runner.guarded(lambda measurement: measurement.settle(number >= warmup))
            if on_round is not None:
                on_round(number)

        calls = {name: runner.round for name, runner in runners.items()}
        samples = interleave(calls, rounds, warmup, settle, synchronize)
        return {name: runner.row(samples[name]) for name, runner in runners.items()}


class _Runner:
    """A candidate until it fails."""

    def __init__(self, start: Callable[[], Measurement]) -> None:
        self._error: str | None = None
        self._measurement: Measurement | None = None
        self._measurement = self._try(start)

    def round(self, number: int) -> Any:
        return self.guarded(lambda measurement: measurement.round(number))

    def guarded(self, call: Callable[[Measurement], Any]) -> Any:
        measurement = self._measurement
        return None if measurement is None else self._try(lambda: call(measurement))

    def row(self, taken: Samples) -> Row:
        made = self.guarded(
            lambda measurement: {"seconds": taken.to_dict(), **measurement.row(taken)}
        )
        return {**(made or {}), "error": self._error}

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a candidate does wrong, the others go on
            self._error = f"{type(error).__name__}: {error}"
            self._measurement = None  # with all that it holds
            return None
