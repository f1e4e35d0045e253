"""Budgets: the one place where a ratio, tokens or bytes become integer counts.

A ratio is the fraction KEPT: of all tokens that a sequence has seen so far, so that what may stay
grows while it decodes, or of its prompt. A byte budget is per sequence and covers its rows in every
compressed layer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from kvpress.errors import BudgetError
from kvpress.formulas.sizes import UNITS

UNLIMITED = 2**62  # the quota of a budget that keeps everything, however long the text grows
_ALLOWED = (
    "Allowed: a fraction kept in (0, 1] written with a decimal point, of all tokens seen (0.5) or"
    " of the prompt, whatever is decoded (0.5prompt); a whole number of tokens of at least 1"
    " (2048); or bytes with a unit (256MiB)."
)
Unit = Literal["fraction", "prompt", "tokens", "bytes"]


class Geometry(NamedTuple):
    """What a byte budget must know of the store of one layer."""

    layers: int  # layers that share the budget
    heads: int  # rows of one sequence in this layer
    page_slots: int
    page_bytes: int  # bytes of one page: keys, values, positions, per-slot state, table entry
    row_bytes: int  # bytes of a row besides its pages
    headroom: int  # slots that must stay free for tokens appended before the next eviction


class Quota(NamedTuple):
    """How many slots one row keeps, and which of them are protected."""

    slots: int  # may exceed the tokens seen: such a row still grows
    sink: int  # the first tokens of the sequence
    recent: int  # the last tokens of the sequence
    floored: bool  # the budget was below the protected tokens, which won


def share(ratio: float | Fraction, count: int) -> int:
    """`ratio` of `count`, rounded down, exact in decimals: share(0.29, 100) is 29."""
    exact = ratio if isinstance(ratio, Fraction) else _exact(ratio)
    return exact.numerator * count // exact.denominator


@lru_cache(maxsize=1024)
def _exact(ratio: float) -> Fraction:
    """A ratio as it is written: binary rounding must not cost a slot."""
    return Fraction(str(ratio))


@lru_cache(maxsize=8192)
def _times(numerator: int, denominator: int, portion: float) -> Fraction:
    """A portion of a ratio; of every sequence and layer, and asked for with every decoded token."""
    return Fraction(numerator, denominator) * _exact(round(portion, 9))


@dataclass(frozen=True)
class Budget:
    """How much of the cache is kept: a fraction of the tokens, tokens per row, or bytes."""

    unit: Unit
    amount: Fraction

    @classmethod
    def parse(cls, given: Budget | str | int | float, name: str = "budget") -> Budget:
        """Reads `0.5` (fraction kept), `0.5prompt`, `2048` (tokens) or `256MiB` (bytes).

        name: of what is given. Raises BudgetError.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip()
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?\s*([A-Za-z]*)", text)
        if not match or isinstance(given, bool):
            raise BudgetError(f"{name}={text!r} cannot be read. {_ALLOWED}")
        number, exponent, unit = match.group(1), match.group(2) or "", match.group(3).upper()
        amount = Fraction(number + exponent)
        if unit and unit not in (*UNITS, "PROMPT"):
            raise BudgetError(
                f"{name}={text!r} has the unknown unit {match.group(3)!r}. {_ALLOWED}"
            )
        kind: Unit = "fraction" if "." in number or exponent else "tokens"
        if unit == "PROMPT":
            kind = "prompt"
        elif unit:
            kind, amount = "bytes", Fraction(int(amount * UNITS[unit]))
        budget = cls(kind, amount)
        if amount <= 0 or (budget.relative and amount > 1):
            raise BudgetError(f"{name}={text} is out of range. {_ALLOWED}")
        return budget

    @property
    def relative(self) -> bool:
        """Whether this is a fraction of tokens."""
        return self.unit in ("fraction", "prompt")

    @property
    def grows(self) -> bool:
        """Whether decoded tokens add to what is kept."""
        return self.unit == "fraction" and self.amount < 1

    def slots(self, seen: int, geometry: Geometry, portion: float = 1.0) -> int:
        """Slots per row after `seen` real tokens, before protection. Raises BudgetError.

        portion: what this layer gets, in multiples of the budget.
        """
        if self.amount == 1 and self.unit == "fraction":
            return UNLIMITED
        if self.relative:
            return max(1, share(self._part(portion), seen))
        exact = _exact(round(portion, 9))
        if self.unit == "tokens":
            return min(max(1, share(exact, int(self.amount))), UNLIMITED)
        rows = geometry.layers * geometry.heads
        pages = (int(self.amount) // rows - geometry.row_bytes) // geometry.page_bytes
        if pages * geometry.page_slots - geometry.headroom < 1:
            least = -(-(1 + geometry.headroom) // geometry.page_slots)
            needed = rows * (least * geometry.page_bytes + geometry.row_bytes)
            raise BudgetError(
                f"budget={self} is too small: {geometry.layers} layers × {geometry.heads} KV heads"
                f" × {least} page(s) of {geometry.page_slots} slots ({geometry.page_bytes} bytes)"
                f" need {needed} bytes per sequence. Raise the budget to at least {needed}B, or"
                " lower page_size or interval."
            )
        slots = max(1, share(exact, pages)) * geometry.page_slots - geometry.headroom
        return min(max(1, slots), UNLIMITED)

    def _part(self, portion: float) -> Fraction:
        """What a layer keeps of the tokens."""
        return _times(self.amount.numerator, self.amount.denominator, portion)

    def __str__(self) -> str:
        if self.relative:  # with a decimal point, so that it reads as a fraction
            return f"{float(self.amount)}{'prompt' if self.unit == 'prompt' else ''}"
        return f"{int(self.amount)}{'B' if self.unit == 'bytes' else ''}"


@dataclass(frozen=True)
class Limits:
    """A budget with its protected tokens and its rhythm.

    sink: first tokens that always stay. recent: last tokens that always stay, or, when None,
    `recent_ratio` of the budget. interval: decoded tokens between two evictions; 0 evicts after
    prompts only.
    """

    budget: Budget
    sink: int = 0
    recent: int | None = None
    recent_ratio: float = 0.0
    interval: int = 1

    def check(self) -> None:
        """Raises BudgetError if the budget in tokens cannot hold the protected tokens."""
        if self.budget.unit == "tokens":
            self._protect(int(self.budget.amount))

    @property
    def grows(self) -> bool:
        """Whether rows may keep more the more is decoded."""
        return self.budget.grows and self.interval > 0

    def grow(self, uneven: bool) -> bool:
        """Whether rows get other quotas while tokens are decoded: more, or others' where uneven."""
        trades = uneven and self.interval > 0 and self.budget.unit in ("fraction", "tokens")
        return trades or self.grows

    def _recent(self, slots: int) -> int:
        """The protected recent tokens of a row of `slots`."""
        return share(self.recent_ratio, slots) if self.recent is None else self.recent

    def _protect(self, slots: int) -> tuple[int, bool]:
        """The protected recent tokens of a row of `slots`, and whether all protected tokens fit."""
        recent = self._recent(slots)
        fits = self.sink + recent <= slots
        if not fits and not self.budget.relative:
            raise BudgetError(
                f"budget={self.budget} keeps {slots} tokens per row, below sink + recent ="
                f" {self.sink} + {recent} protected tokens. Raise the budget or lower sink or"
                " recent."
            )
        return recent, fits

    @property
    def least(self) -> int:
        """Slots that hold the protected tokens of a row, whatever its budget."""
        fixed = self.recent is not None or self.recent_ratio >= 1
        least = self.sink + (self.recent or 0) if fixed else self.sink / (1 - self.recent_ratio)
        return math.ceil(least)

    def least_slots(self, seen: int, geometry: Geometry) -> float:
        """What a portion of the budget must leave to a row: its protected tokens, and a page."""
        least = self.least
        if self.budget.unit != "bytes":
            return least
        slots = self.budget.slots(seen, geometry)
        pages = (slots + geometry.headroom) / geometry.page_slots
        return max(math.ceil((least + geometry.headroom) / geometry.page_slots), 1) * slots / pages

    def even(self, seen: int) -> float:
        """What the budget gives to every row after `seen` tokens, before it is rounded down."""
        return float(self.budget.amount) * (seen if self.budget.relative else 1)

    def row(self, slots: int) -> Quota:
        """The quota of a row that was given so many slots."""
        recent = self._recent(slots)
        least = self.sink + recent
        return Quota(max(slots, least), self.sink, recent, slots < least)

    def quota(self, seen: int, geometry: Geometry, portion: float = 1.0) -> Quota:
        """How many slots a row keeps after `seen` real tokens.

        portion: of the budget, where layers have budgets of their own; infinite: everything. A
        fraction of a short prompt, or a portion, can fall below the protected tokens; they win
        then, and the quota says so.
        """
        if portion == math.inf:
            return Quota(UNLIMITED, self.sink, self._recent(seen), False)
        slots = self.budget.slots(seen, geometry, portion)
        if portion != 1.0:
            return self.row(slots)
        recent, fits = self._protect(slots)
        if not fits:
            slots = self.sink + recent
        return Quota(slots, self.sink, recent, not fits)
