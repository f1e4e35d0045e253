"""What all requests share: the batcher, the tokenizer, the limits, and whether there is service."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from kvpress.serve.contract import Batcher
from kvpress.serve.feed import Feed
from kvpress.serve.keys import Keys
from kvpress.serve.metrics import Metrics
from kvpress.serve.problems import Problem, dead, restarting, stopping, wrong
from kvpress.serve.replicas.summing import Replicas
from kvpress.serve.texts import Texts

LONGEST_STEP = 30.0  # seconds after which a model that has work and makes no step counts as stuck


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    most_context: tokens of a prompt and its answer. most_new: of an answer. timeout: seconds of a
    request, and those for which a slow reader is waited for.
    """

    most_context: int
    most_new: int
    timeout: float = 600.0

    def new_tokens(self, prompt: int, wanted: int | None) -> int:
        """How long an answer to a prompt of so many tokens may get. Raises Problem."""
        room = self.most_context - prompt
        if wanted is not None and wanted > self.most_new:
            message = f"max_tokens={wanted} is not allowed. Allowed: 1 to {self.most_new}."
            raise wrong("max_tokens", message)
        if room < (wanted or 1):
            message = (
                f"The prompt has {prompt} tokens and its answer may have {wanted or 1}: more than"
                f" this server holds. Allowed: {self.most_context} together."
            )
            raise Problem(413, message, code="context_length_exceeded")
        return min(wanted or self.most_new, room)


@dataclass
class Service:
    """name: of the model, as clients call it. draining: nothing is taken any more.

    feeds: of the requests that are being answered.
    """

    batcher: Batcher
    texts: Texts
    limits: Limits
    name: str
    metrics: Metrics
    keys: Keys = field(default_factory=Keys)
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    feeds: set[Feed] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """Whether the model's thread lives."""
        try:
            return self.batcher.stats().alive
        except Exception:  # whatever it is, nothing can be expected of it
            return False

    @property
    def replicas(self) -> Replicas | None:
        """How its replicas are; None: this process holds the model."""
        found: Replicas | None = getattr(self.batcher, "replicas", None)
        return found

    @property
    def healthy(self) -> bool:
        """Whether it lives and gets on with its work."""
        if not self.alive:
            return False
        stats = self.batcher.stats()
        waited = time.monotonic() - stats.last_step_at
        return not stats.running or waited < LONGEST_STEP

    def check_open(self) -> None:
        """Raises Problem where no request is taken."""
        if self.draining:
            raise stopping()
        if not self.alive:
            raise self._gone()

    def _gone(self) -> Problem:
        return dead() if self.replicas is None else restarting()

    def check_model(self, name: str) -> None:
        """Raises Problem for a model that is not here."""
        if name != self.name:
            message = f"This server has no such model. It has: {self.name}."
            raise Problem(404, message, param="model", code="model_not_found")

    def look_after(self, now: float) -> None:
        """Ends what waits for a dead model, and gives up readers that take nothing."""
        alive = self.alive
        for feed in list(self.feeds):
            if not alive:
                feed.fail(self._gone())
            elif feed.late(now, self.limits.timeout):
                feed.cancel()
                feed.given_up.set()
