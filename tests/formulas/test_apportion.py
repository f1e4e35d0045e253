"""Places shared by weights and by scores: worked examples, exact sums, and properties."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.apportion import apportion, by_score

SHARES = torch.tensor([[0.9, 0.1], [0.2, 0.05], [0.6, 0.15]], dtype=torch.float64).flatten()


def full(value: int, length: int = 6) -> torch.Tensor:
    return torch.full((length,), value)


def test_the_worked_examples_of_calibrated_shares() -> None:
    # c = 0.72432 gives [.6519, .08, .1449, .08, .4346, .1086]; c = 2 caps two rows at 1.
    assert apportion(SHARES, 150, full(8), full(100)).tolist() == [65, 8, 15, 8, 43, 11]
    assert apportion(SHARES, 300, full(8), full(100)).tolist() == [100, 20, 40, 10, 100, 30]


def test_the_worked_example_of_scores_that_compete() -> None:
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.05, 0.01]])
    every = torch.ones_like(score, dtype=torch.bool)
    assert by_score(score, every, 4, torch.tensor([0, 0])).tolist() == [4, 0]
    assert by_score(score, every, 4, torch.tensor([1, 1])).tolist() == [3, 1]


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_within_the_bounds_and_grow_with_the_total(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(40, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    low, high = full(3, 40), torch.randint(3, 90, (40,), generator=generator)
    before = low
    for total in range(int(low.sum()), int(high.sum()) + 1, 37):
        counts = apportion(weight, total, low, high)
        assert int(counts.sum()) == total
        assert bool(((counts >= low) & (counts <= high)).all())
        assert bool((counts >= before - 1).all())  # a remainder may go to another row
        before = counts
    assert apportion(weight, 10**6, low, high).tolist() == high.tolist()
    assert apportion(weight, 0, low, high).tolist() == low.tolist()
    equal = apportion(torch.ones(40), 400, full(0, 40), full(99, 40))
    assert equal.tolist() == [10] * 40


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_scores_compete_as_in_a_sorted_list(seed: int, least: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 9, (5, 12), generator=generator).float()  # with many ties
    open_ = torch.rand(5, 12, generator=generator) < 0.7
    for places in (0, 7, 20, 99):
        own = [min(least, int(row.sum())) for row in open_]
        free, counts = [], list(own)
        for row in range(5):
            slots = [s for s in range(12) if open_[row, s]]
            slots.sort(key=lambda s: (-float(score[row, s]), s))
            free += [(-float(score[row, s]), row, s) for s in slots[own[row] :]]
        for _, row, _ in sorted(free)[: max(0, places - sum(own))]:
            counts[row] += 1
        found = by_score(score, open_, places, full(least, 5))
        assert found.tolist() == (counts if places else own)
