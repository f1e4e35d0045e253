"""Mutated calls of every operator: each is refused, or equal to the reference; none may crash."""

from __future__ import annotations

import calls
import pytest
from outcomes import compare, outcome, reference, rounding

from kvpress import ops
from kvpress.errors import OperatorError

CALLS = 10_000
PER_OPERATOR = -(-CALLS // len(calls.MAKERS))


def test_every_operator_is_tried() -> None:
    assert sorted(calls.MAKERS) == ops.names()


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
@pytest.mark.parametrize("name", calls.MAKERS)
def test_mutated_calls_are_refused_or_equal_the_reference(name: str) -> None:
    ran = 0
    for seed in range(PER_OPERATOR):
        call = calls.some(name, seed)
        given = outcome(name, getattr(ops, name), call)
        wanted = outcome(name, reference(name), call)
        accepted = not isinstance(wanted, OperatorError)
        rounded = rounding(name, call) if accepted else 0.0
        compare(given, wanted, f"{name}, seed {seed}", rounded)
        ran += accepted
    assert ran > PER_OPERATOR // 8
