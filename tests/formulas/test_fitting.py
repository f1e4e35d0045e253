"""Biases and values of kept slots by least squares: the worked example and the properties."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.fitting import (
    Seen,
    bounded_least_squares,
    fit_values,
    fit_weights,
    least_squares,
    see,
)

WIDE = (0.05, 1097.0)


def row(slots: int, queries: int, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one row whose weights are neither flat nor on one slot."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((queries, width), (slots, width), (slots, width))
    return tuple(torch.randn(*size, generator=draw) for size in sizes)


def seen_by(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, free: list[int], rest: list[int]
) -> Seen:
    masks = (torch.zeros(len(key), dtype=torch.bool) for _ in range(2))
    chosen = [
        mask.index_fill(0, torch.tensor(x).long(), True)
        for mask, x in zip(masks, (free, rest), strict=True)
    ]
    return see(query, (key, value), *chosen, (1.0, 0.0))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return (query @ key.mT + bias).softmax(1) @ value


def test_the_worked_example_of_the_specification() -> None:
    key, value = torch.tensor([0, 0.5, 2, 2.2]).double(), torch.tensor([1.0, 2, 5, 3]).double()
    query, kept = torch.tensor([0.0, 1, -1]).double(), [0, 2]
    logit = query[:, None] * key
    weight = (logit - logit.amax(1, keepdim=True)).exp()
    times = bounded_least_squares(weight[:, kept], weight.sum(1), WIDE, 0.0)
    torch.testing.assert_close(times, torch.tensor([1.55497, 2.41236]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        times.log(), torch.tensor([0.44146, 0.88060]).double(), atol=1e-5, rtol=0
    )
    shares = weight[:, kept] * times
    shares = shares / shares.sum(1, keepdim=True)
    out = (weight / weight.sum(1, keepdim=True) @ value)[:, None]
    torch.testing.assert_close(
        shares,
        torch.tensor([[0.39194, 0.60806], [0.08024, 0.91976], [0.82648, 0.17352]]).double(),
        atol=1e-5,
        rtol=0,
    )
    made = least_squares(shares, out, value[kept, None], 0.0)
    torch.testing.assert_close(
        made[:, 0], torch.tensor([1.29438, 3.75706]).double(), atol=1e-5, rtol=0
    )
    assert float((shares @ made - out).abs().max()) == pytest.approx(0.04183, abs=1e-5)


def test_what_keeps_all_slots_changes_nothing() -> None:
    query, key, value = row(24, 96)
    seen = seen_by(query, key, value, list(range(24)), [])
    times = fit_weights(seen, WIDE, 1e-3)
    torch.testing.assert_close(times, torch.ones(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(fit_values(seen, times, value, 1e-3), value, atol=1e-4, rtol=0)


def test_a_slot_for_equal_ones_weighs_as_often_as_they_are() -> None:
    query, two, _ = row(2, 40)
    key, value = two[[0, 0, 1, 1, 1]], torch.tensor([[1.0], [1], [3], [3], [3]])
    seen = seen_by(query, key, value, [0, 2], [])
    times = fit_weights(seen, WIDE, 0.0)
    torch.testing.assert_close(times, torch.tensor([2.0, 3.0]), atol=1e-3, rtol=0)
    made = fit_values(seen, times, value[[0, 2]], 1e-3)
    bias = times.log()
    torch.testing.assert_close(
        attention(query, key[[0, 2]], made, bias),
        attention(query, key, value, torch.zeros(5)),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("part", [False, True])
def test_fits_are_better_than_slots_as_they_were_also_beside_fixed_ones(part: bool) -> None:
    query, key, value = row(60, 400)
    free, rest = list(range(4, 20)), [0, 1, 2, 3, 58, 59]
    seen = seen_by(query, key, value, free, rest)
    given = seen.alone() if part else seen
    once = torch.ones(len(free))
    times = fit_weights(given, WIDE, 1e-3)
    own, values = value[free], fit_values(given, once, value[free], 1e-3)
    both = fit_values(given, times, value[free], 1e-3)
    plain = seen.error(once, own)
    assert given.error(once, values) < given.error(once, own)
    assert seen.error(times, both) < 0.7 * plain
    # What is predicted is what attention then gives, with slots that stay as they are beside.
    places, bias = [*free, *rest], torch.cat([times.log(), torch.zeros(len(rest))])
    kept = attention(query, key[places], torch.cat([both, value[rest]]), bias)
    torch.testing.assert_close(kept, seen.output(times, both), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        seen.out_ME, attention(query, key, value, torch.zeros(60)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("slots, queries", [(40, 12), (12, 40)])
def test_more_slots_than_queries_twins_and_slots_that_nobody_sees_give_numbers(
    slots: int, queries: int
) -> None:
    query, key, value = row(slots, queries)
    key[3] = key[2]
    key[5] = -100 * query.mean(0)
    seen = seen_by(query, key, value, list(range(slots // 2)), [slots - 1])
    for ridge in (0.0, 1e-3):
        times = fit_weights(seen, WIDE, ridge)
        made = fit_values(seen, times, value[: slots // 2], ridge)
        assert bool(times.isfinite().all()) and bool(made.isfinite().all())
        assert float(times.min()) >= WIDE[0] and float(times.max()) <= WIDE[1]


def test_both_forms_of_the_normal_equations_agree() -> None:
    draw = torch.Generator().manual_seed(2)
    factor, wanted, own = (
        torch.rand(*s, generator=draw).double() for s in ((30, 50), (30, 4), (50, 4))
    )
    tall = torch.cat([factor, torch.zeros(40, 50).double()])
    padded = torch.cat([wanted, torch.zeros(40, 4).double()])
    torch.testing.assert_close(
        least_squares(factor, wanted, own, 1e-2), least_squares(tall, padded, own, 1e-2)
    )


def test_bounds_bind_and_what_is_found_within_them_is_best() -> None:
    draw = torch.Generator().manual_seed(3)
    factor = torch.rand(50, 6, generator=draw).double()
    wanted = factor @ torch.tensor([-1.0, 0.5, 2, 9, 1, 1]).double()
    found = bounded_least_squares(factor, wanted, (0.1, 4.0), 0.0)
    slope = factor.mT @ (factor @ found - wanted)
    low, high = found <= 0.1, found >= 4.0
    assert bool(low.any()) and bool(high.any())
    assert float(slope[~low & ~high].abs().max()) < 1e-2 * float(slope.abs().max())
    assert bool((slope[low] >= 0).all()) and bool((slope[high] <= 0).all())


def test_learned_sinks_take_their_share() -> None:
    query, key, value = row(20, 30)
    sink = torch.full((30,), 1.5)
    kept, rest = torch.arange(20) < 8, torch.arange(20) >= 18
    seen = see(query, (key, value), kept, rest, (1.0, 0.0), sink)
    logit = torch.cat([query @ key.mT, sink[:, None]], dim=1)
    weight = logit.softmax(1)
    torch.testing.assert_close(seen.rest_M, weight[:, 18:].sum(1))
    torch.testing.assert_close(seen.out_ME, weight[:, :20] @ value)
