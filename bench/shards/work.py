"""Work in units that processes share, and its results in the order in which one has them.

A unit is done by one process: a context with all policies, a size with all candidates. Its parts
are what is written: a cell each. Units are numbered in the order of one process, in which results
are written whoever comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol


class Unit(NamedTuple):
    """What is left to do of a unit: some of its parts, by their places."""

    number: int
    parts: tuple[int, ...]


class Found(NamedTuple):
    """The result of a part; or why there is none, where its processes died."""

    unit: int
    part: int
    value: Any = None
    lost: str | None = None


class Head(NamedTuple):
    """What holds for all results: what was asked for, and where it is measured."""

    settings: dict[str, Any]
    environment: dict[str, Any]


NO_HEAD = Head({}, {})


class Worker(Protocol):
    """What one process can do, as soon as its model is there."""

    @property
    def head(self) -> Head:
        """What it would write above its results."""

    @property
    def units(self) -> Sequence[Sequence[Any]]:
        """Of each unit the parts, as plain values; all processes have the same."""

    def do(self, unit: int, parts: Sequence[int]) -> Iterator[Any]:
        """The results of some parts, in their order, each as soon as it is there."""


class Team(Protocol):
    """Processes that have the same units, of which each does some."""

    @property
    def head(self) -> Head:
        """Of all of them."""

    @property
    def units(self) -> Sequence[Sequence[Any]]:
        """Of each unit the parts."""

    def agreed(self, todo: Sequence[Unit]) -> Sequence[Unit]:
        """What is to be done, as the process sees it that knows the file."""

    def results(self, todo: Sequence[Unit]) -> Iterator[Found]:
        """What all of them find, each once, in any order."""


class Alone:
    """A team of this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.head, self.units = worker.head, worker.units

    def agreed(self, todo: Sequence[Unit]) -> Sequence[Unit]:
        """The same."""
        return todo

    def results(self, todo: Sequence[Unit]) -> Iterator[Found]:
        """In order."""
        for unit in todo:
            done = self._worker.do(unit.number, unit.parts)
            for part, value in zip(unit.parts, done, strict=True):
                yield Found(unit.number, part, value)
            del done  # and what it holds, before the next unit begins


def in_order(todo: Sequence[Unit], found: Iterable[Found]) -> Iterator[Found]:
    """What was found, in the order of what was to do; what comes early is held back."""
    coming, early = iter(found), dict[tuple[int, int], Found]()
    for unit in todo:
        for place in ((unit.number, part) for part in unit.parts):
            while place not in early:
                one = next(coming)
                early[one.unit, one.part] = one
            yield early.pop(place)
