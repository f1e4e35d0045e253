"""Replicas without Ray: real ones in this process, over scripted batchers, that can be killed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from scripted import WORDS
from scripted import Batcher as Scripted
from serving import eventually

from kvpress.batching.desk import Most
from kvpress.batching.handle import Handle
from kvpress.batching.request import Request
from kvpress.batching.stats import Stats
from kvpress.errors import TooLargeError
from kvpress.serve.replicas.fleet import Fleet
from kvpress.serve.replicas.replica import Replica
from kvpress.serve.replicas.scaling import Scaling
from kvpress.serve.replicas.wire import Command, Facts, Lost, News

NEEDED = 100  # bytes of every request


class Desk:
    """Takes everything that is not too long."""

    most = Most(4096, 2048)

    def ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids)

    def handle(self, number: int, request: Request, wake: Callable[[], None]) -> Handle:
        if len(request.ids) + request.max_new_tokens > self.most.context:
            raise TooLargeError("Too long.")
        return Handle(number, request, wake, None, NEEDED, request.tenant)


class Batcher(Scripted):
    """The scripted batcher, with what a replica asks of the real one.

    holds: draws nothing, as one whose prompts take long.
    """

    shared_chunk = 16

    def __init__(self, tokenizer: Any, script: Any, **options: Any) -> None:
        self.desk, self.holds, self.steps = Desk(), False, 0
        super().__init__(tokenizer, script, **options)
        self.model.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)

    def stats(self) -> Any:
        own = super().stats()._asdict() | {"waiting": 0, "bytes_capacity": 10 * NEEDED}
        more = {"bytes_promised": 0, "steps": 0, "step_seconds": 0.0, "tokens_per_second": 10.0}
        return Stats(**own, **more, waiting_tokens=0)

    def _step(self, handle: Handle) -> None:
        if not self.holds or handle.is_cancelled:
            super()._step(handle)


class Link:
    """The way to a replica in this process; everything is pickled on it."""

    def __init__(self, batcher: Batcher, tokenizer: Any) -> None:
        self.batcher, self._tokenizer = batcher, tokenizer
        self.dead = self.silent = self.closed = False
        self.replica, self._places, self.fails = Replica(self), 0, list[Exception]()

    def load(self) -> tuple[Any, Any]:
        return self.batcher, self._tokenizer

    def clean(self) -> None:
        self.closed = True

    def start(self, given_up: Callable[[], bool]) -> Facts:
        if self.fails:
            raise self.fails.pop()
        return self.replica.start()

    def tell(self, commands: Sequence[Command]) -> None:
        place, self._places = self._places, self._places + 1
        if not self.dead:
            self.replica.tell(place, pickle.loads(pickle.dumps(commands)))

    def hear(self, timeout: float) -> News:
        news = pickle.dumps(self.replica.news(0.02))
        if self.silent:
            raise Lost("it said nothing")
        if self.dead:
            raise Lost("it was killed")
        heard: News = pickle.loads(news)
        return heard

    def close(self) -> None:
        self.replica.close()
        self.kill()

    def kill(self) -> None:
        self.dead = True
        self.batcher.close()


class Fakes:
    """A fleet, and the links of all replicas that it ever had, by number."""

    def __init__(
        self,
        tokenizer: Any,
        count: int = 2,
        script: Callable[[Request], str] = lambda request: WORDS,
        scaling: Scaling | None = None,
        fails: Sequence[Exception] = (),
        **options: Any,
    ) -> None:
        self.links: dict[int, list[Link]] = {}
        self.fails = list(fails)

        def make(number: int) -> Link:
            link = Link(Batcher(tokenizer, script, **options), tokenizer)
            link.fails = [self.fails.pop()] if self.fails else []
            self.links.setdefault(number, []).append(link)
            return link

        self.overs = 0
        self.fleet = Fleet(make, scaling or Scaling(count, count), self._over)

    def _over(self) -> None:
        self.overs += 1

    def batcher(self, number: int) -> Batcher:
        """That of the newest replica of a number."""
        return self.links[number][-1].batcher

    def kill(self, number: int) -> None:
        """As a process that is gone between two words."""
        self.links[number][-1].dead = True

    def hold(self, *numbers: int) -> None:
        """Lets replicas draw nothing."""
        for number in numbers:
            self.batcher(number).holds = True

    def whole(self, count: int) -> None:
        """Waits until so many replicas serve."""
        eventually(lambda: self.fleet.replicas.alive == count, 30.0)

    def __enter__(self) -> Fakes:
        return self

    def __exit__(self, *error: object) -> None:
        self.fleet.close()
