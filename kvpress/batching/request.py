"""What a request asks for, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvpress.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None: as the generation config of the model says.

    temperature: 0 takes the likeliest token. seed: the same tokens whoever else is served; None: of
    the system. logprobs: so many of the likeliest tokens are told with each one drawn, 0 the drawn
    one alone; None: none. min_new_tokens: before that many the text does not end.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        ranges = {
            "temperature": (0.0, 100.0),
            "top_p": (0.0, 1.0),
            "top_k": (0, 2**31),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "min_new_tokens": (0, 2**31),
            "seed": (0, 2**63 - 1),
            "logprobs": (0, 20),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name}={value} is not allowed. Allowed: {low} to {high}.")


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


class Drawn(NamedTuple):
    """A token that was drawn.

    logprob: of it, before sampling options; None where they were not asked for. top: the likeliest
    tokens and theirs.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Usage:
    """What a request took so far. Seconds count from its submission; None: not yet.

    cached_tokens: of the prompt, that were not read anew because a prefix was known. slots_kept: of
    all KV heads and layers. slots_full: what would be kept without a policy. bytes_held: of keys,
    values and what belongs to them; bytes_peak: the most at any time. first_token_seconds: when the
    first token was drawn. seconds: when it was over. preempted: how often its rows were put aside.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    slots_kept: int = 0
    slots_full: int = 0
    bytes_held: int = 0
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
