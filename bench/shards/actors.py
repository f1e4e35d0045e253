"""A run that actors of Ray share: each takes the next unit when it is free, the driver writes.

Results come one by one, so that of an actor that dies only what it had not handed over is done
again, by another in its place.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from kvpress.bench.common.environment import machine
from kvpress.bench.shards.cluster import Share, ray
from kvpress.bench.shards.errors import ShardError
from kvpress.bench.shards.work import Found, Head, Unit, Worker

REPEATS = 3  # of a unit whose actors die, and of a model whose actors die while they load it
_SAME = ("threads", "versions", "commit", "backends")  # of the environment, beside the machine
Units = Sequence[Sequence[Any]]


class Actor:
    """What runs in a process of Ray's: a worker."""

    def __init__(
        self,
        make: Callable[[], Worker],
        share: Share,
        folder: str,
        variables: Mapping[str, str],
    ) -> None:
        """folder: that of the driver, for paths that are relative."""
        os.environ.update(variables)
        if not share.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves them as they are
        if os.path.isdir(folder):
            os.chdir(folder)
        torch.set_num_threads(share.threads)
        self._make = make

    def ready(self) -> tuple[Head, Units]:
        """What it found to do, once its model is loaded."""
        self._worker = self._make()
        return self._worker.head, self._worker.units

    def do(self, unit: int, parts: Sequence[int]) -> Iterator[Any]:
        """Results of a unit."""
        yield from self._worker.do(unit, parts)


@dataclass(eq=False)
class _Hand:
    """An actor as the driver knows it: what it was told last, and what is left of that."""

    actor: Any
    answer: Any  # a reference, while it loads its model; then a generator of them, or None
    unit: int | None = None
    left: deque[int] = field(default_factory=deque)


class Actors:
    """So many actors in a cluster that is there. head: what the first says that is ready."""

    def __init__(self, make: Callable[[], Worker], count: int, share: Share) -> None:
        self._ray, self._make, self._count, self._share = ray(), make, count, share
        self._hands: list[_Hand] = []
        self._tried: Counter[int | None] = Counter()  # of units; None: of models
        self._found: tuple[Head, Units] | None = None
        self._waiting = deque[Unit]()

    def __enter__(self) -> Actors:
        try:
            for _ in range(self._count):
                self._add()
            while self._found is None:
                list(self._next())
        except BaseException:
            self._kill()
            raise
        self.head, self.units = self._found
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    def agreed(self, todo: Sequence[Unit]) -> Sequence[Unit]:
        """The same: the driver knows the file."""
        return todo

    def results(self, todo: Sequence[Unit]) -> Iterator[Found]:
        """What actors find, as it comes."""
        self._waiting = deque(todo)
        while self._waiting or any(hand.unit is not None for hand in self._hands):
            for hand in self._hands:
                if hand.answer is None and self._waiting:
                    self._tell(hand, self._waiting.popleft())
            yield from self._next()

    def _add(self) -> None:
        """One more actor, on the emptiest node."""
        known = {name: value for name, value in os.environ.items() if name.startswith("KVPRESS_")}
        kind = self._ray.remote(Actor).options(
            num_cpus=self._share.cpus, num_gpus=self._share.gpus, scheduling_strategy="SPREAD"
        )
        actor = kind.remote(self._make, self._share, os.getcwd(), known)
        self._hands.append(_Hand(actor, actor.ready.remote()))

    def _tell(self, hand: _Hand, unit: Unit) -> None:
        hand.unit, hand.left = unit.number, deque(unit.parts)
        told = hand.actor.do.options(num_returns="streaming")
        hand.answer = told.remote(unit.number, unit.parts)

    def _next(self) -> Iterator[Found]:
        """What the next answer says, whichever actor gives it."""
        by_answer = {hand.answer: hand for hand in self._hands if hand.answer is not None}
        answered, _ = self._ray.wait(list(by_answer), num_returns=1)
        hand, errors = by_answer[answered[0]], self._ray.exceptions
        try:
            if hand.unit is None:
                self._compare(self._ray.get(hand.answer))
                hand.answer = None
                self._tried[None] = 0
            elif (reference := next(hand.answer, None)) is None:
                hand.unit = hand.answer = None
            else:
                value = self._ray.get(reference)
                yield Found(hand.unit, hand.left.popleft(), value)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            yield from self._replace(hand, error)

    def _compare(self, found: tuple[Head, Units]) -> None:
        """Raises ShardError for an actor that would measure something else than the others."""
        if self._found is None:
            self._found = found
        (first, units), (head, own) = self._found, found
        there, here = _machine(first), _machine(head)
        if (first.settings, units, there) != (head.settings, own, here):
            raise ShardError(
                f"Actors of Ray differ: {first.settings}, {there} in one, {head.settings}, {here}"
                " in another. All nodes need the same versions, devices and files."
            )

    def _replace(self, hand: _Hand, error: Exception) -> Iterator[Found]:
        """Another actor does what is left, unless too many have died of it."""
        self._hands.remove(hand)
        self._ray.kill(hand.actor)
        self._tried[hand.unit] += 1
        why = f"its actor of Ray died {self._tried[hand.unit]} times, at last: {_brief(error)}"
        lost = self._tried[hand.unit] > REPEATS
        if hand.unit is None and lost:
            raise ShardError(f"The model cannot be loaded: {why} Ray's logs say more.")
        if hand.unit is not None and lost:
            yield from (Found(hand.unit, part, lost=why) for part in hand.left)
        elif hand.unit is not None and hand.left:
            self._waiting.appendleft(Unit(hand.unit, tuple(hand.left)))
        if self._waiting or self._found is None:
            self._add()

    def _kill(self) -> None:
        for hand in self._hands:
            self._ray.kill(hand.actor)


def _machine(head: Head) -> list[Any]:
    """What decides results and times."""
    known = head.environment
    return [machine(known), *(known[name] for name in _SAME)]


def _brief(error: Exception) -> str:
    """What happened, without the numbers and addresses of this one time."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
