"""Policies at the compressions that were asked for: budgets given to those that take one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from kvpress.bench.common.candidates import CACHES

from kvpress.errors import BudgetError
from kvpress.policy.loading import parse


def numbers(given: Sequence[str]) -> list[float]:
    """The ratios of an option, whose values may be joined with commas. Raises BudgetError."""
    return [_number(text.strip()) for whole in given for text in whole.split(",")]


def _number(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 1 < ratio <= 1000:
        raise BudgetError(
            f"--ratio {text} is no compression. Give numbers above 1, at most 1000: 4 is 4:1, a"
            " quarter of the tokens."
        )
    return ratio


def at_ratios(policies: Sequence[str], ratios: Sequence[float]) -> dict[str, float | None]:
    """The policies to run, and the ratio that was asked of each.

    One that takes a budget and does not give it comes once with `budget=1/ratio` for each ratio.
    Others come as they are, with None. Raises what `parse` raises.
    """
    made: dict[str, float | None] = {}
    for policy in policies:
        for name, ratio in _at(policy, ratios):
            made.setdefault(name, ratio)
    return made


def _at(policy: str, ratios: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    parts = policy.split("+")
    place = _without_budget(policy, parts) if ratios else None
    if place is None:
        yield policy, None
        return
    part = parts[place]
    head, colon, tail = part.rpartition(":")
    joined = "," if head and colon and "=" in tail else ":"  # after other options, or alone
    for ratio in ratios:
        budget = f"{part}{joined}budget={_kept(ratio)}"
        yield "+".join([*parts[:place], budget, *parts[place + 1 :]]), ratio


def _without_budget(policy: str, parts: Sequence[str]) -> int | None:
    """Which part takes a budget that it was not given; None: there is none."""
    if policy in CACHES:
        return None
    for place, (part, made) in enumerate(zip(parts, parse(policy).policies, strict=True)):
        takes = any(field.name == "budget" for field in dataclasses.fields(made))
        if takes and "budget=" not in part:
            return place
    return None


def _kept(ratio: float) -> str:
    """A fraction with a decimal point, which tells it from tokens."""
    return f"{1 / ratio:.6f}".rstrip("0")
