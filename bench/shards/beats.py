"""What processes tell each other while they work: a thread of each meets the others.

They wait for each other here and nowhere else, several times a second, so that one that works for
long is not taken for one that is lost. One that ends breaks the connection, which the others see
at their next beat; one that says nothing is given up after the timeout of the group.
"""

from __future__ import annotations

import _thread
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kvpress.bench.shards.errors import ShardError

from kvpress.parallel import Ranks

INTERVAL = 0.1  # seconds between two beats
_END, _FAILED = "end", "failed"


class Message(NamedTuple):
    """What a process said, to all of them and itself, in the order in which it said it."""

    rank: int
    about: str
    value: Any


class Beats:
    """What this process says, and what it hears."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._said: list[tuple[str, Any]] = []
        self._heard: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._error: ShardError | None = None
        self._working = False
        self._thread = threading.Thread(target=self._run, name="kvpress-beats", daemon=True)
        self._thread.start()

    def say(self, about: str, value: Any = None) -> None:
        """Tells all processes a plain value, with the next beat."""
        with self._lock:
            self._said.append((about, value))

    def hear(self) -> Message:
        """The next message. Raises ShardError once a process is lost, or has failed."""
        heard = self._heard.get()
        if heard is None:
            self._heard.put(None)
            raise self._lost()
        return heard

    def heard(self) -> Iterator[Message]:
        """Those that are there already."""
        while not self._heard.empty():
            yield self.hear()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Work of the main thread that ends with ShardError as soon as a process is lost.

        Not where signals of the keyboard are ignored: there it is seen when the work is done.
        """
        try:
            with self._lock:
                self._working = self._error is None
            if self._error is not None:
                raise self._lost()
            yield
            with self._lock:
                self._working = False
        except KeyboardInterrupt:
            if self._error is not None:
                raise self._lost() from None
            raise
        finally:
            self._working = False

    def end(self, error: BaseException | None = None) -> None:
        """Says how this process ended, and waits until the others have heard it, or have ended."""
        self.say(_END if error is None else _FAILED, error and f"{type(error).__name__}: {error}")
        self._thread.join()

    def _lost(self) -> ShardError:
        assert self._error is not None
        return self._error

    def _run(self) -> None:
        ended = set[int]()
        while self._error is None and len(ended) < self._ranks.size:
            with self._lock:
                own, self._said = self._said, []
            try:
                every = self._ranks.objects(own)
            except Exception as error:  # whatever gloo says of a connection that broke
                self._stop(f"{self._ranks}: another process was lost, or said nothing: {error}.")
                return
            for rank, said in enumerate(every):
                ended |= {rank for about, _ in said if about == _END}
                for about, value in said:
                    self._take(rank, about, value)
            time.sleep(INTERVAL)

    def _take(self, rank: int, about: str, value: Any) -> None:
        if about == _FAILED:
            self._stop(f"{self._ranks}: process {rank} failed: {value}.")
        elif about != _END:
            self._heard.put(Message(rank, about, value))

    def _stop(self, why: str) -> None:
        """The first reason counts."""
        with self._lock:
            if self._error is None:
                self._error = ShardError(
                    f"{why.rstrip('.')}. What was written stays: start all processes again with the"
                    " same --out, and they go on from it."
                )
            if self._working:
                _thread.interrupt_main()
        self._heard.put(None)
