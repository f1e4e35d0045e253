"""One replica: a model and its batcher in a process of its own, which the front process calls."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kvpress.batching.handle import Event, Handle
from kvpress.hf.drawing import ends_of
from kvpress.serve.replicas.wire import Command, Facts, News, Told, portable
from kvpress.serve.texts import vocabulary

if TYPE_CHECKING:
    from kvpress.batching.batcher import Batcher

_MOST_FIGURES = 20_000  # that are kept for a front process that does not ask


class Loading(Protocol):
    """What a replica serves."""

    def load(self) -> tuple[Batcher, Any]:
        """The batcher and the tokenizer."""

    def clean(self) -> None:
        """Removes what loading has left on a disk."""


class Replica:
    """Takes commands, and hands out what is new when it is asked.

    Each of `tell` and `news` is called by one thread, `start` and `close` by another one.
    """

    def __init__(self, plan: Loading) -> None:
        self._plan = plan
        self._batcher: Batcher | None = None
        self._handles: dict[int, Handle] = {}
        self._changed = threading.Condition()
        self._told: list[Told] = []
        self._figures: list[tuple[str, float]] = []
        self._taken, self._early = 0, dict[int, Sequence[Command]]()

    def start(self) -> Facts:
        """Loads the model. Raises what loading raises."""
        batcher, tokenizer = self._plan.load()
        batcher.observe(self._measured)
        self._batcher = batcher
        return Facts(
            policy=batcher.policy,
            desk=batcher.desk,
            ends=ends_of(batcher.model.generation_config),
            vocabulary=vocabulary(batcher.model),
            most_waiting=batcher.most_waiting,
            shared_chunk=batcher.shared_chunk,
            capacity=batcher.stats().bytes_capacity,
            tokenizer=tokenizer,
            node=platform.node(),
        )

    def tell(self, place: int, commands: Sequence[Command]) -> None:
        """Does what it is told, in the order in which messages were sent. place: of this one."""
        self._early[place] = commands  # a long one may come behind those that were sent later
        while (next_ones := self._early.pop(self._taken, None)) is not None:
            for command in next_ones:
                self._do(command)
            with self._changed:
                self._taken += 1
                self._changed.notify_all()

    def _do(self, command: Command) -> None:
        number, request = command.number, command.request
        if request is not None:
            try:
                self._submit(number, vars(request))
            except Exception as error:  # of this request alone
                self._put(Told(number, Event(error=portable(error))))
        handle = self._handles.get(number)
        if handle is None:
            return
        if command.cancelled:
            handle.cancel()
        if command.paused != handle.is_paused:
            handle.pause(command.paused)

    def _submit(self, number: int, asked: dict[str, Any]) -> None:
        assert self._batcher is not None, "it has started"
        handle = self._batcher.submit(**asked)
        self._handles[number] = handle
        handle.listen(partial(self._hear, number, handle))

    def _hear(self, number: int, handle: Handle, event: Event) -> None:
        """In the thread of the model."""
        if event.error is not None:
            event = Event(error=portable(event.error))
        if event.ends:
            self._handles.pop(number, None)
        self._put(Told(number, event, handle.usage if event.ends else None))

    def _put(self, told: Told) -> None:
        with self._changed:
            self._told.append(told)
            self._changed.notify_all()

    def _measured(self, name: str, value: float) -> None:
        """In the thread of the model."""
        with self._changed:
            if len(self._figures) < _MOST_FIGURES:
                self._figures.append((name, value))

    def news(self, wait: float) -> News:
        """All that is new; waits for something, for so many seconds at most."""
        assert self._batcher is not None, "it has started"
        with self._changed:
            taken = self._taken
            self._changed.wait_for(lambda: self._told or self._taken != taken, wait)
            told, self._told = tuple(self._told), []
            figures, self._figures = tuple(self._figures), []
            taken = self._taken
        stats = self._batcher.stats()
        return News(told, figures, stats, time.monotonic() - stats.last_step_at, taken)

    def close(self) -> None:
        """Ends all that is served, and removes files."""
        if self._batcher is not None:
            self._batcher.close()
        self._plan.clean()
