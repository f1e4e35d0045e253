"""One context, read once by one system and asked everything that somebody wants to know of it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvpress.bench.common.reads import StepReads
from kvpress.bench.quality.sample import Sample
from kvpress.bench.quality.system import Call, Held, System, recording
from torch import Tensor

EXTRACTED = 16  # tokens of an answer to a prompt that asks for a secret


class How(NamedTuple):
    """How samples are made and asked about.

    stepwise: answers are fed token by token, as when decoding. generate: they are decoded greedily
    besides. ratios: the compression that was asked of policies, by their names.
    """

    seed: int = 0
    stepwise: bool = False
    generate: bool = False
    ratios: Mapping[str, float | None] = {}


PLAIN = How()


class Reading:
    """A context under one system. What is asked of it is asked once, on forks of its cache.

    known: another reading of the same context, whose layers' calls may be used again.
    """

    def __init__(
        self, system: System, sample: Sample, stepwise: bool, known: Reading | None = None
    ) -> None:
        self._system, self._sample, self._stepwise = system, sample, stepwise
        self._known = known
        self.seconds = 0.0

    @functools.cached_property
    def logits(self) -> list[Tensor]:
        """Before each token of every right answer: `[T, Y]` each."""
        cache = self._cache
        with self._timed():
            return [self._system.ask(cache, q, self._stepwise) for q in self._sample.questions]

    @functools.cached_property
    def generated(self) -> list[list[int]]:
        """An answer to every question, no longer than the right one."""
        cache = self._cache
        with self._timed():
            return [
                self._system.decode(cache, q.prompt, len(q.answer)) for q in self._sample.questions
            ]

    @functools.cached_property
    def extracted(self) -> list[list[int]]:
        """An answer to every prompt that asks for the secret."""
        cache = self._cache
        with self._timed():
            return [
                self._system.decode(cache, e.prompt, EXTRACTED) for e in self._sample.extractions
            ]

    @property
    def held(self) -> Held:
        """Bytes after the context, before the first question."""
        return self._read[1]

    @property
    def reads(self) -> StepReads | None:
        """What the steps of the questions read so far; None: everything."""
        return self._system.step_reads(self._cache)

    @property
    def calls(self) -> list[Call]:
        """What the layers handed over, where this is the first reading of the context."""
        return self._read[2]

    @property
    def _cache(self) -> Any:
        return self._read[0]

    @functools.cached_property
    def _read(self) -> tuple[Any, Held, list[Call]]:
        known = None if self._known is None else self._known.calls
        context, protect, calls = self._sample.context, self._sample.protect, list[Call]()
        with self._timed():
            if known is not None:
                cache = self._system.read(context, known, protect)
            else:
                with recording(calls):
                    cache = self._system.read(context, (), protect)
        return cache, Held(*self._system.bytes(cache)), calls

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
