"""Requests, and the replicas that serve them, as the front process sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvpress.batching.handle import Handle
from kvpress.batching.request import Request, Usage
from kvpress.batching.stats import Stats
from kvpress.serve.replicas.routing import Load
from kvpress.serve.replicas.wire import Command, Facts, Link, Lost, News

STUCK = 120.0  # seconds without a step, though requests run, after which a replica is given up
UNREAD = 30.0  # seconds in which it must have read what it was told


@dataclass
class Ticket:
    """A request that was taken, and where it is.

    starts: hashes of how its prompt begins. moves: how often it began again because a replica was
    lost. refused_by: replicas that had no place for it. sent_at: when its replica was told.
    """

    handle: Handle
    starts: Sequence[bytes] = ()
    moves: int = 0
    refused_by: set[int] = field(default_factory=set)
    sent_at: float = 0.0
    told: tuple[bool, bool] = (False, False)

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer."""
        request = self.handle.request
        return len(request.ids) + request.max_new_tokens

    def command(self) -> Command:
        """The request for a replica, with the time that is left to it."""
        self.sent_at, handle = time.monotonic(), self.handle
        self.told = (handle.is_cancelled, handle.is_paused)
        request: Request = handle.request
        if request.timeout is not None:
            request = replace(request, timeout=max(request.timeout - handle.age, 1e-3))
        return Command(handle.number, request, *self.told)

    def change(self) -> Command | None:
        """What its caller has changed since it was told last; None: nothing."""
        now = (self.handle.is_cancelled, self.handle.is_paused)
        if now == self.told:
            return None
        self.told = now
        return Command(self.handle.number, None, *now)

    def settle(self, usage: Usage) -> None:
        """Takes what the request took; its seconds count from when it was submitted here."""
        late = self.sent_at - self.handle.submitted_at
        for name in ("queue_seconds", "first_token_seconds", "seconds"):
            seconds = getattr(usage, name)
            if seconds is not None:
                setattr(usage, name, seconds + late)
        self.handle.usage = usage


class Member:
    """A replica that serves.

    number: of the replica. live: its requests. stats: the last that it said. leaving: it gets no
    more requests.
    """

    def __init__(self, number: int, link: Link, facts: Facts) -> None:
        self.number, self.link, self.facts = number, link, facts
        self.live: dict[int, Ticket] = {}
        self.stats: Stats | None = None
        self.leaving = False
        self.promised = self.tokens = 0
        self.last_step_at = self._read_at = time.monotonic()
        self._sent = self._taken = 0

    @property
    def running(self) -> int:
        """Requests that hold a cache, by its last word."""
        return min(self.stats.running, len(self.live)) if self.stats is not None else 0

    @property
    def load(self) -> Load:
        """How busy it is."""
        full = self.leaving or len(self.live) - self.running >= self.facts.most_waiting
        return Load(self.number, self.promised, self.tokens, self.facts.capacity, full)

    def take(self, ticket: Ticket) -> None:
        """Sends it a request."""
        self.live[ticket.handle.number] = ticket
        self.promised += ticket.handle.needed
        self.tokens += ticket.tokens
        self.tell(ticket.command())

    def release(self, ticket: Ticket) -> None:
        """Counts a request no more that is over, or goes elsewhere."""
        if self.live.pop(ticket.handle.number, None) is not None:
            self.promised -= ticket.handle.needed
            self.tokens -= ticket.tokens

    def tell(self, *commands: Command) -> None:
        """Sends it commands."""
        if self._sent == self._taken:
            self._read_at = time.monotonic()
        self._sent += 1
        self.link.tell(commands)

    def note(self, news: News) -> None:
        """Takes down how it is."""
        now = time.monotonic()
        if news.taken != self._taken or news.taken == self._sent:
            self._taken, self._read_at = news.taken, now
        self.stats, self.last_step_at = news.stats, now - news.rested

    def check(self, news: News) -> None:
        """Raises Lost for a replica that speaks, but does not work."""
        if not news.stats.alive:
            raise Lost("its batcher has stopped")
        if news.stats.running and news.rested > STUCK:
            raise Lost(f"it made no step for {STUCK:g} seconds")
        if self._sent != self._taken and time.monotonic() - self._read_at > UNREAD:
            raise Lost(f"it read nothing for {UNREAD:g} seconds")
