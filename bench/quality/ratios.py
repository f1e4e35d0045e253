"""Policies at the compressions that were asked for: budgets given to those that take one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from kvpress.bench.common.candidates import CACHES

from kvpress.errors import BudgetError
from kvpress.policy.loading import parse

_TRIES = 6  # budgets that are tried, each on a whole context
_CLOSE = 0.03  # below the bytes that were asked for: near enough


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


def by_bytes(
    policies: Sequence[str], ratios: Sequence[float], share: Callable[[str], float]
) -> dict[str, float | None]:
    """The same, with budgets whose bytes are what was asked for, and not their tokens.

    share: the bytes that a policy holds of a context, of those of a full cache in bfloat16. Raises
    BudgetError where no budget is small enough.
    """
    made: dict[str, float | None] = {}
    for policy in policies:
        place = _without_budget(policy, policy.split("+"))
        if place is None:
            made.setdefault(policy, None)
            continue
        for ratio in ratios:
            made.setdefault(_fitting(policy, place, ratio, share), ratio)
    return made


def _fitting(policy: str, place: int, ratio: float, share: Callable[[str], float]) -> str:
    """The policy with the largest budget found that holds no more: by secants, then from below."""
    wanted, budget, fits, above = 1 / ratio, 1 / ratio, 0.0, 1.0 + _CLOSE
    for _ in range(_TRIES):
        found = share(_with_budget(policy, place, _rounded(budget)))
        if found <= wanted:
            fits = max(fits, budget)
            if found >= (1 - _CLOSE) * wanted or budget >= 1:
                break
        else:
            above = min(above, budget)
        guess = budget * wanted / found * (1 - _CLOSE / 2)
        budget = min(1.0, guess if fits < guess < above else (fits + above) / 2)
    if not fits:
        raise BudgetError(
            f"{policy} was not found to hold a {ratio:g}th of the bytes of a bfloat16 cache. Ask"
            " for a smaller ratio, or for longer contexts (--length)."
        )
    return _with_budget(policy, place, _rounded(fits))


def _with_budget(policy: str, place: int, budget: str) -> str:
    parts = policy.split("+")
    head, colon, tail = parts[place].rpartition(":")
    joined = "," if head and colon and "=" in tail else ":"  # after other options, or alone
    parts[place] += f"{joined}budget={budget}"
    return "+".join(parts)


def _at(policy: str, ratios: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    parts = policy.split("+")
    place = _without_budget(policy, parts) if ratios else None
    if place is None:
        yield policy, None
        return
    for ratio in ratios:
        yield _with_budget(policy, place, _kept(ratio)), ratio


def _without_budget(policy: str, parts: Sequence[str]) -> int | None:
    """Which part takes a budget that it was not given; None: there is none."""
    if policy in CACHES:
        return None
    for place, (part, made) in enumerate(zip(parts, parse(policy).policies, strict=True)):
        takes = any(field.name == "budget" for field in dataclasses.fields(made))
        if takes and "budget=" not in part:
            return place
    return None


def _rounded(budget: float) -> str:
    """A fraction, not more than it was."""
    return str(max(1, math.floor(budget * 10_000)) / 10_000)


def _kept(ratio: float) -> str:
    """A fraction with a decimal point, which tells it from tokens."""
    return f"{1 / ratio:.6f}".rstrip("0")
