"""What a caller holds of a request: its tokens as they come, and how it ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvpress.batching.request import Completion, Drawn, Request, Usage
from kvpress.policy.recipe import Recipe


class Event(NamedTuple):
    """News of a request: some tokens, or its end: a completion or an error, once and last."""

    drawn: tuple[Drawn, ...] = ()
    completion: Completion | None = None
    error: BaseException | None = None

    @property
    def ends(self) -> bool:
        """Whether nothing comes behind it."""
        return self.completion is not None or self.error is not None


class Handle:
    """One request that was submitted. Any thread may use it.

    request: what was asked for. usage: as far as it is known; final once the request is over.
    recipe: that of the engine, with the budget of the request. needed: bytes that it may come to
    hold. family: what prompts must have in common to share a prefix.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        wake: Callable[[], None],
        recipe: Recipe | None = None,
        needed: int = 0,
        family: str = "",
    ) -> None:
        self.number, self.request, self.usage = number, request, Usage(len(request.ids))
        self.recipe, self.needed, self.family = recipe, needed, family
        self.submitted_at = time.monotonic()
        self.is_cancelled = False
        self.is_paused = False
        self._wake, self._changed = wake, threading.Condition()
        self._drawn: list[Drawn] = []
        self._end: Event | None = None
        self._listeners: list[Callable[[Event], None]] = []

    # For who waits

    def __iter__(self) -> Iterator[int]:
        """The tokens, as they are drawn. Raises the error that ended the request."""
        place = 0
        while (token := self._token(place)) is not None:
            place += 1
            yield token
        self._completion()

    def _token(self, place: int) -> int | None:
        """The token at a place, when it is there; None: there is none."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._drawn) > place or self._end is not None)
            return self._drawn[place].token if len(self._drawn) > place else None

    def result(self, timeout: float | None = None) -> Completion:
        """The whole completion. Raises the error that ended it, TimeoutError where it takes longer.

        timeout: seconds to wait; the request goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._end is not None, timeout):
                raise TimeoutError(f"Request {self.number} is not over after {timeout} seconds.")
        return self._completion()

    async def wait(self) -> Completion:
        """The same for coroutines. A task that is cancelled meanwhile cancels the request."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def ended() -> None:
            if not over.done():
                over.set_result(None)

        def listener(event: Event) -> None:
            if event.ends:
                loop.call_soon_threadsafe(ended)

        self.listen(listener)
        try:
            await over
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._completion()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls a function with all that comes, and at once with what has come before.

        It is called in the thread of the model, which waits for it meanwhile: it must be short. One
        that raises is not called again.
        """
        with self._changed:
            past = [Event(tuple(self._drawn))] if self._drawn else []
            if self._end is not None:
                past.append(self._end)
            else:
                self._listeners.append(listener)
            for event in past:
                listener(event)

    def cancel(self) -> None:
        """Ends the request before its next step, and frees what it holds. Later it does nothing."""
        self.is_cancelled = True
        self._wake()

    def pause(self, paused: bool = True) -> None:
        """Draws no more tokens until it goes on; a reader that is slow holds up nobody else."""
        self.is_paused = paused
        self._wake()

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.monotonic() - self.submitted_at

    @property
    def is_late(self) -> bool:
        """Whether it takes longer than it may."""
        return self.request.timeout is not None and self.age > self.request.timeout

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._end is not None

    @property
    def drawn(self) -> list[Drawn]:
        """The tokens so far."""
        with self._changed:
            return list(self._drawn)

    def _completion(self) -> Completion:
        assert self._end is not None, "whoever asks has waited for the end"
        if self._end.error is not None:
            raise self._end.error
        assert self._end.completion is not None, "an end is the one or the other"
        return self._end.completion

    # For who serves

    def deliver(self, event: Event) -> None:
        """Hands out news; nothing after the end."""
        with self._changed:
            if self._end is not None:
                return
            self._drawn.extend(event.drawn)
            if event.ends:
                self._end = event
            heard, self._listeners = self._listeners, []
            for listener in heard:
                try:
                    listener(event)
                except Exception:  # somebody who left must not stop the others
                    continue
                if not event.ends:
                    self._listeners.append(listener)
            self._changed.notify_all()
