"""What a request asks for, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvpress.hf.sampling import Drawn, Sampling

__all__ = ["Completion", "Drawn", "Request", "Sampling", "Usage"]


@dataclass(frozen=True)
class Request:
    """One text to go on with.

    ids: of the prompt. max_new_tokens: the most that are drawn. stop: texts that end it. ends: ids
    that end it. budget: instead of the policy's own; None: that. tenant: whose it is; prefixes are
    shared and turns are taken by it. priority: larger goes first. timeout: seconds from its
    submission; None: as long as it takes.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    budget: str | float | int | None = None
    tenant: str = ""
    priority: int = 0
    timeout: float | None = None


@dataclass
class Usage:
    """What a request took so far. Seconds count from its submission; None: not yet.

    cached_tokens: of the prompt, that were not read anew because a prefix was known. slots_kept: of
    all KV heads and layers. slots_full: if none were evicted. bytes_held: of keys and values, and
    what belongs to them; bytes_full: of transformers' own cache; bytes_peak: the most at any time.
    first_token_seconds: when the first token was drawn. seconds: when it was over. preempted: how
    often its rows were put aside.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    slots_kept: int = 0
    slots_full: int = 0
    bytes_held: int = 0
    bytes_full: int = 0
    bytes_peak: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds: float | None = None
    preempted: int = 0


class Completion(NamedTuple):
    """How a request ended.

    reason: `stop` (an end token or a stop text), `length`, or `cancelled`.
    """

    tokens: tuple[int, ...]
    reason: str
    usage: Usage
