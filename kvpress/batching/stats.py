"""What a batcher says of itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

_LOG = logging.getLogger("kvpress")
Listener = Callable[[str, float], None]  # of a figure by name, as it is measured


class Stats(NamedTuple):
    """A moment of a batcher. Counts are of all requests since it began; bytes are held now.

    bytes_capacity: the cap; None: there is none. bytes_promised: the most that running requests and
    prefixes may come to. bytes_full: what transformers' own caches would hold of the same texts.
    last_step_at: `time.monotonic()`. waiting_tokens: of requests that wait, with what they may
    draw.
    """

    running: int
    waiting: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    preempted: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    bytes_held: int
    bytes_promised: int
    bytes_capacity: int | None
    bytes_full: int
    bytes_prefixes: int
    bytes_host: int
    bytes_disk: int
    steps: int
    step_seconds: float
    last_step_at: float
    tokens_per_second: float
    waiting_tokens: int
    alive: bool


@dataclass
class Counts:
    """What is counted while it goes on."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    bytes_held: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    last_step_at: float = field(default_factory=time.monotonic)
    tokens_per_second: float = 0.0  # of the last steps, prompts included
    listeners: list[Listener] = field(default_factory=list)

    def step(self, seconds: float, tokens: int) -> None:
        """Counts a step that fed so many tokens."""
        self.steps += 1
        self.step_seconds += seconds
        self.last_step_at = time.monotonic()
        rate = tokens / max(seconds, 1e-9)
        weight = 0.1 if self.tokens_per_second else 1.0
        self.tokens_per_second += weight * (rate - self.tokens_per_second)
        self.tell("step_seconds", seconds)
        self.tell("step_tokens", tokens)

    def tell(self, name: str, value: float) -> None:
        """Hands a figure to who listens. One that raises is not asked again."""
        for listener in list(self.listeners):
            try:
                listener(name, value)
            except Exception:  # requests must not end because a figure was not wanted
                _LOG.exception("A listener of the batcher failed")
                self.listeners.remove(listener)
