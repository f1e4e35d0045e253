"""Requests with fixed lengths and arrivals: the same for a seed, on any machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpress.errors import KVPressError


class WorkloadError(KVPressError, ValueError):
    """Requests that cannot be made."""


@dataclass(frozen=True)
class Asked:
    """A request. at: seconds after the first moment, when it arrives. new_tokens: all are drawn."""

    at: float
    ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """What arrives. prompt, new: least and most tokens. rate: requests per second; 0: all at once.

    Lengths are evenly spread and then shuffled, so that all seeds have the same work. The gaps
    between arrivals are drawn from an exponential distribution: a Poisson process, as of many
    people who do not know of each other.
    """

    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    rate: float
    seed: int

    def __post_init__(self) -> None:
        for name, (low, high) in {"prompt": self.prompt, "new": self.new}.items():
            if not 1 <= low <= high:
                raise WorkloadError(
                    f"{name}={low}:{high}: two numbers of tokens, at least 1, the smaller one"
                    " first. Turn them round, or raise them."
                )
        if self.requests < 1 or self.rate < 0:
            raise WorkloadError(
                f"requests={self.requests}, rate={self.rate:g}: at least one request, and a rate"
                " of 0 (all at once) or more. Raise them."
            )

    def make(self, ids: Sequence[int]) -> list[Asked]:
        """The requests in order of arrival. ids: of a text, from which prompts are taken in turn.

        No two prompts overlap while the text lasts: nothing can be shared among them.
        """
        drawn = random.Random(self.seed)
        prompts = _shuffled(drawn, self.prompt, self.requests)
        new = _shuffled(drawn, self.new, self.requests)
        place, at, made = drawn.randrange(len(ids)), 0.0, []
        for length, tokens in zip(prompts, new, strict=True):
            prompt = tuple(ids[(place + i) % len(ids)] for i in range(length))
            made.append(Asked(at, prompt, tokens))
            place += length
            at += drawn.expovariate(self.rate) if self.rate else 0.0
        return made


def text_ids(model: Any, tokenizer: Any, load: Load) -> list[int]:
    """Ids of the language reference. Raises PromptError where the model has too few positions."""
    from kvpress.bench.common.prompt import check_positions
    from kvpress.bench.common.text import default_text

    check_positions(model, load.prompt[1], load.new[1])
    ids: list[int] = tokenizer(default_text().content, add_special_tokens=False)["input_ids"]
    return ids


def _shuffled(drawn: random.Random, ends: tuple[int, int], count: int) -> list[int]:
    """So many whole numbers, evenly from the first to the last, in an order that was drawn."""
    low, high = ends
    spread = [low + round(i * (high - low) / max(1, count - 1)) for i in range(count)]
    drawn.shuffle(spread)
    return spread
