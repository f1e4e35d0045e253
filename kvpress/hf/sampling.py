"""How a caller wants tokens drawn, and what is told of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvpress.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None: as the generation config of the model says.

    Tokens are sampled where temperature, top_p, top_k or min_p is given, or the config samples.
    temperature: 0 takes the likeliest token, whatever else is given. seed: the same tokens whoever
    else is served; None: of the system. logprobs: so many of the likeliest tokens are told with
    each one drawn, 0 the drawn one alone; None: none. min_new_tokens: before that many the text
    does not end.
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


class Drawn(NamedTuple):
    """A token that was drawn.

    logprob: of it, before sampling options; None where they were not asked for. top: the likeliest
    tokens and theirs.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
