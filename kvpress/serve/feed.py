"""News of requests on their way from the model's thread to a coroutine that writes them out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence

from kvpress.batching.handle import Event, Handle

MOST_EVENTS = 1024  # that wait to be written; beyond it nothing more is drawn


class Feed:
    """Events of the handles of one HTTP request, each with the number of its handle.

    The model's thread never waits for a reader: it puts its news down, and pauses the requests of
    one that is slow until all is taken.
    """

    def __init__(self, handles: Sequence[Handle]) -> None:
        self._handles, self._loop = handles, asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._lock, self._ready = threading.Lock(), asyncio.Event()
        self._paused_since: float | None = None
        self._blocked_since: float | None = None
        self.given_up = asyncio.Event()  # the reader is too slow
        for number, handle in enumerate(handles):
            handle.listen(lambda event, number=number: self._hear(number, event))  # type: ignore[misc]

    async def take(self) -> list[tuple[int, Event]]:
        """All that has come; waits for something."""
        await self._ready.wait()
        with self._lock:
            events = list(self._events)
            self._events.clear()
            self._ready.clear()
            paused, self._paused_since = self._paused_since is not None, None
        if paused:
            self._pause(False)
        return events

    def _hear(self, number: int, event: Event) -> None:
        """In the thread of the model."""
        with self._lock:
            first = not self._events
            self._events.append((number, event))
            full = len(self._events) >= MOST_EVENTS and self._paused_since is None
            if full:
                self._paused_since = time.monotonic()
        if full:
            self._pause(True)
        if first:
            self._loop.call_soon_threadsafe(self._ready.set)

    def _pause(self, paused: bool) -> None:
        for handle in self._handles:
            if not handle.done:
                handle.pause(paused)

    # For who looks after all feeds

    def writing(self, begins: bool) -> None:
        """Notes that something is being written, or is written."""
        self._blocked_since = time.monotonic() if begins else None

    def late(self, now: float, most: float) -> bool:
        """Whether the reader has taken nothing for so many seconds."""
        with self._lock:
            since = [at for at in (self._paused_since, self._blocked_since) if at is not None]
        return bool(since) and now - min(since) > most

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, whatever the batcher says."""
        self._hear(0, Event(error=error))
        self.cancel()

    def cancel(self) -> None:
        """Ends all requests that are not over."""
        for handle in self._handles:
            if not handle.done:
                handle.cancel()
