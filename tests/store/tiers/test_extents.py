"""The allocator of places against a plain list of units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpress import CacheError
from kvpress.store.tiers.extents import UNIT, Extents

UNITS, BASE = 24, 5 * UNIT


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9 * UNIT)), max_size=60))
def test_it_takes_the_first_hole_that_is_large_enough(steps: list[tuple[bool, int]]) -> None:
    extents, plain, held = Extents(UNITS * UNIT + 7, BASE), [None] * UNITS, []
    for take, number in steps:
        if take:
            size = -(-number // UNIT)
            fits = [i for i in range(UNITS - size + 1) if not any(plain[i : i + size])]
            place = extents.take(number)
            assert place == (BASE + fits[0] * UNIT if fits else None)
            if place is not None:
                begin = (place - BASE) // UNIT
                plain[begin : begin + size] = [place] * size
                held.append(place)
        elif held:
            place = held.pop(number % len(held))
            extents.give(place)
            plain = [None if owner == place else owner for owner in plain]
        taken = {place: plain.count(place) * UNIT for place in held}
        extents.check(taken)
        assert extents.held == sum(taken.values())
        if taken:
            with pytest.raises(CacheError, match="not those"):
                extents.check({})


def test_a_place_is_freed_once() -> None:
    extents = Extents(4 * UNIT)
    place = extents.take(1)
    extents.give(place)
    with pytest.raises(CacheError, match="freed twice"):
        extents.give(place)
    assert extents.take(5 * UNIT) is None
    assert extents.take(4 * UNIT) == 0
    assert extents.largest == 0
