"""Selection against its definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress.formulas.ranking import drop_one, keep_top, kept_index, matched, protect
from kvpress.types import EMPTY


def reference(
    score: list[float], position: list[int], protected: list[bool], keep: int
) -> set[int]:
    slots = [s for s, p in enumerate(position) if p != EMPTY]
    return set(sorted(slots, key=lambda s: (not protected[s], -score[s], position[s]))[:keep])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_keep_top_equals_sorting_by_protection_score_and_position(
    size: int, random: object
) -> None:
    score = [random.choice([0.0, 0.5, 1.0, -2.0]) for _ in range(size)]  # type: ignore[attr-defined]
    position = random.sample(range(50), size)  # type: ignore[attr-defined]
    position = [p if random.random() < 0.8 else EMPTY for p in position]  # type: ignore[attr-defined]
    protected = [p != EMPTY and random.random() < 0.3 for p in position]  # type: ignore[attr-defined]
    keep = random.randint(0, size)  # type: ignore[attr-defined]
    x, p, m = (torch.tensor(v)[None, None] for v in (score, position, protected))
    kept = keep_top(x, p, m, torch.tensor([[keep]]))[0, 0]
    assert set(kept.nonzero().flatten().tolist()) == reference(score, position, protected, keep)
    stored = sum(q != EMPTY for q in position)
    if stored > sum(protected):
        everything_but_one = reference(score, position, protected, stored - 1)
        gone = {s for s, q in enumerate(position) if q != EMPTY} - everything_but_one
        assert {int(drop_one(x, p, m))} == gone


def test_infinite_scores_are_scores() -> None:
    score = torch.tensor([[[torch.inf, 1.0, -torch.inf, 2.0]]])
    position, none = torch.arange(4)[None, None], torch.zeros(1, 1, 4, dtype=torch.bool)
    assert keep_top(score, position, none, torch.tensor([[2]])).tolist() == [
        [[True, False, False, True]]
    ]
    assert int(drop_one(score, position, none)) == 2


def test_ragged_quotas_in_one_call() -> None:
    score = torch.arange(6.0).repeat(2, 1)[None]
    position = torch.arange(6).repeat(2, 1)[None]
    kept = keep_top(score, position, torch.zeros(1, 2, 6, dtype=torch.bool), torch.tensor([[1, 4]]))
    assert kept.sum(-1).tolist() == [[1, 4]]
    assert kept_index(kept, torch.tensor([[1, 4]]))[0, 1].tolist() == [2, 3, 4, 5]


def test_protection_follows_positions_not_slots() -> None:
    position = torch.tensor([[[7, 0, 3, EMPTY, 8, 1]]])
    kept = protect(position, torch.tensor([9]), torch.tensor([2]), torch.tensor([[2]]))
    assert kept.tolist() == [[[True, True, False, False, True, True]]]
    short = protect(position, torch.tensor([9]), torch.tensor([0]), torch.tensor([[100]]))
    assert short.tolist() == [[[True, True, True, False, True, True]]]


def test_a_score_that_is_no_number_goes_first() -> None:
    score = torch.tensor([[[3.0, 1.0, torch.nan, -torch.inf]]])
    position, none = torch.arange(4)[None, None], torch.zeros(1, 1, 4, dtype=torch.bool)
    assert int(drop_one(score[..., :3], position[..., :3], none[..., :3])) == 2


def test_values_are_matched_by_the_positions_of_their_slots() -> None:
    position = torch.tensor([[[4, EMPTY, 0, 2]]])
    values = torch.tensor([[[0.4, 9.0, 0.1, 0.2]]])
    wanted = torch.tensor([[[0, 7, 2, EMPTY, 4, 1]]])
    found = matched(values, position, wanted, -1.0)
    torch.testing.assert_close(found, torch.tensor([[[0.1, -1.0, 0.2, -1.0, 0.4, -1.0]]]))
