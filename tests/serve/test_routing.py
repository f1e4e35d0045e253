"""Which replica serves a request, and how many there are to be: nothing here runs."""

from __future__ import annotations

import pytest

from kvpress.serve.replicas.routing import Load, Router, beginnings
from kvpress.serve.replicas.scaling import Pressure, Scaling, wanted

PROMPT = list(range(100))


def test_beginnings_are_whole_parts_that_are_not_the_end() -> None:
    assert len(beginnings("a", PROMPT, 32)) == 3
    assert len(beginnings("a", PROMPT[:96], 32)) == 2  # the last part is never shared
    assert beginnings("a", PROMPT[:32], 32) == () == beginnings("a", PROMPT, 0)
    longer = beginnings("a", [*PROMPT[:64], *[7] * 64], 32)
    assert (
        longer[:2] == beginnings("a", PROMPT, 32)[:2]
        and longer[2] != beginnings("a", PROMPT, 32)[2]
    )
    assert not set(beginnings("b", PROMPT, 32)) & set(longer)
    assert len(beginnings("a", [1] * 100_000, 32)) == 64


def test_the_least_busy_replica_is_the_first() -> None:
    router = Router()
    loads = [Load(0, 300, 10), Load(1, 100, 90), Load(2, 100, 20)]
    assert router.order(loads) == [2, 1, 0]
    full = [*loads[:2], loads[2]._replace(full=True)]
    assert router.order(full) == [1, 0]
    assert router.order([load._replace(full=True) for load in loads]) == []


def test_room_comes_before_bytes() -> None:
    loads = [Load(0, 50, 0, capacity=100), Load(1, 60, 0, capacity=200)]
    assert Router().order(loads, needed=40) == [0, 1]
    assert Router().order(loads, needed=60) == [1, 0]


def test_who_has_read_a_beginning_goes_first_unless_it_is_much_busier() -> None:
    router, starts = Router(slack=50), beginnings("a", PROMPT, 32)
    router.note(starts, 1)
    assert router.order([Load(0, 0, 0), Load(1, 90, 40)], starts) == [1, 0]
    assert router.order([Load(0, 0, 0), Load(1, 90, 51)], starts) == [0, 1]
    assert router.order([Load(0, 0, 100), Load(1, 90, 250)], starts) == [1, 0]
    tight = [Load(0, 0, 0, capacity=100), Load(1, 90, 1, capacity=100)]
    assert router.order(tight, starts, needed=20) == [0, 1]
    assert router.order([Load(0), Load(1, full=True)], starts) == [0]
    assert router.order([Load(0), Load(1, 1, 1)], beginnings("b", PROMPT, 32)) == [0, 1]


def test_the_longest_beginning_decides_and_the_newest_reader_is_remembered() -> None:
    router, starts = Router(), beginnings("a", PROMPT, 32)
    router.note(starts, 0)
    router.note(starts[:2], 1)
    loads = [Load(0, 9, 9), Load(1, 9, 9), Load(2)]
    assert router.order(loads, starts)[0] == 0
    assert router.order(loads, starts[:2])[0] == 1
    router.forget(0)
    assert router.order(loads, starts)[0] == 1
    router.forget(1)
    assert router.order(loads, starts)[0] == 2


def test_what_is_remembered_is_bounded() -> None:
    router = Router()
    for number in range(5000):
        router.note(beginnings("a", [number] * 40, 32), 1)
    loads = [Load(0), Load(1, 9, 9)]
    assert router.order(loads, beginnings("a", [0] * 40, 32))[0] == 0
    assert router.order(loads, beginnings("a", [4999] * 40, 32))[0] == 1


@pytest.mark.parametrize(
    ("pressure", "count"),
    [
        (Pressure(2, 0.0, 0.0), 1),
        (Pressure(1, 0.0, 0.0), 1),
        (Pressure(0, 0.0, 0.0), 1),
        (Pressure(2, 0.5, 0.0), 2),
        (Pressure(2, 0.2, 5.0), 2),
        (Pressure(2, 0.9, 0.0), 3),
        (Pressure(2, 2.5, 0.0), 6),
        (Pressure(1, 0.1, 35.0), 4),
    ],
)
def test_bytes_and_waiting_tokens_say_how_many_are_wanted(pressure: Pressure, count: int) -> None:
    assert wanted(pressure) == count


def test_a_replica_is_added_or_let_go_once_the_work_has_asked_long_enough() -> None:
    scaling = Scaling(1, 3, up_after=30, down_after=600)
    busy, idle = Pressure(1, 3.0, 0.0), Pressure(3, 0.0, 0.0)
    assert [scaling.step(busy, now) for now in (1, 20, 31, 60)] == [1, 1, 2, 2]
    assert scaling.step(busy, 200) == 2  # the second one still starts
    busy = busy._replace(serving=2)
    assert [scaling.step(busy, now) for now in (300, 330, 331)] == [2, 3, 3]
    busy = busy._replace(serving=3)
    assert [scaling.step(busy, now) for now in (400, 500)] == [3, 3]  # as many as may be
    assert [scaling.step(idle, now) for now in (1000, 1500)] == [3, 3]
    assert scaling.step(Pressure(3, 0.5, 0.0), 1550) == 3  # it begins to count again
    assert [scaling.step(idle, now) for now in (1600, 2199, 2200)] == [3, 3, 2]
    idle = idle._replace(serving=2)
    assert [scaling.step(idle, now) for now in (2201, 2801, 3500, 5000)] == [2, 1, 1, 1]
