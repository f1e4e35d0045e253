"""Ratio, tokens and bytes into counts, in one function."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpress.errors import BudgetError
from kvpress.policy.budget import UNLIMITED, Budget, Geometry, Limits, share

GEOMETRY = Geometry(layers=3, heads=2, page_slots=16, page_bytes=16 * 100, row_bytes=0, headroom=1)


@pytest.mark.parametrize(
    ("given_", "unit", "seen", "slots"),
    [
        (0.5, "fraction", 4001, 2000),
        ("0.29", "fraction", 100, 29),  # 0.29 · 100 is 28.999… in binary
        ("1.0", "fraction", 10, UNLIMITED),
        ("1e-1", "fraction", 55, 5),
        (0.01, "fraction", 5, 1),
        (2048, "tokens", 5, 2048),
        ("2048", "tokens", 9000, 2048),
        ("96000B", "bytes", 9000, 159),  # 16,000 bytes a row, ten pages, one slot of headroom
        ("0.01MB", "bytes", 9000, 15),
        ("1KiB", "bytes", 9000, None),
    ],
)
def test_examples(given_: object, unit: str, seen: int, slots: int | None) -> None:
    budget = Budget.parse(given_)  # type: ignore[arg-type]
    assert budget.unit == unit
    if slots is None:
        with pytest.raises(BudgetError, match=r"page\(s\) of 16 slots"):
            budget.slots(seen, GEOMETRY)
    else:
        assert budget.slots(seen, GEOMETRY) == slots
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "wrong", [0, 0.0, 1.5, "-1", "-0.5", "half", "10 XB", "", True, None, "nan", "inf", "1.0001"]
)
def test_wrong_budgets_say_what_is_allowed(wrong: object) -> None:
    with pytest.raises(BudgetError, match=r"^read=.*Allowed: a fraction kept"):
        Budget.parse(wrong, "read")  # type: ignore[arg-type]


@given(st.integers(1, 10**6), st.integers(1, 999))
def test_a_fraction_is_rounded_down_exactly(seen: int, thousandths: int) -> None:
    assert share(thousandths / 1000, seen) == thousandths * seen // 1000
    assert Budget.parse(thousandths / 1000).slots(seen, GEOMETRY) == max(
        1, thousandths * seen // 1000
    )


def test_protected_tokens_beyond_a_token_budget_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"below sink \+ recent = 4 \+ 61"):
        Limits(Budget.parse(64), sink=4, recent=61).check()
    Limits(Budget.parse(64), sink=4, recent=60).check()


def test_protected_tokens_beyond_a_fraction_win_and_say_so() -> None:
    quota = Limits(Budget.parse(0.5), sink=4, recent=8).quota(10, GEOMETRY)
    assert (quota.slots, quota.recent, quota.floored) == (12, 8, True)
    quota = Limits(Budget.parse(0.5), sink=4, recent_ratio=0.3).quota(100, GEOMETRY)
    assert (quota.slots, quota.recent, quota.floored) == (50, 15, False)


def test_the_bytes_that_an_error_asks_for_are_enough() -> None:
    geometry = GEOMETRY._replace(headroom=100, row_bytes=16)
    with pytest.raises(BudgetError) as error:
        Budget.parse("9600B").slots(50, geometry)
    enough = re.search(r"at least (\d+B)", str(error.value))
    assert enough is not None
    assert Budget.parse(enough.group(1)).slots(50, geometry) >= 1
