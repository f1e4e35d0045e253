"""Leverage scores: the worked example of the specification, and what must hold of them."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.leverage import leverage, standard, within_blocks

KEYS = torch.tensor([[1.0, 0], [1, 0.1], [0.9, 0], [0, 2]])[None, None]
HELD = torch.ones(1, 1, 4, dtype=torch.bool)


def test_the_worked_example() -> None:
    found = leverage(KEYS, HELD, 0.0)[0, 0]
    assert found.tolist() == pytest.approx([0.12332, 0.45194, 0.67548, 0.74925], abs=1e-5)
    assert float(found.sum()) == pytest.approx(2, abs=1e-5)  # the rank
    apart = KEYS[0, 0] - KEYS[0, 0].mean(0)
    share = 0.01 * 2 / float((apart.T @ apart).trace())  # of the example: λ = 0.01
    found = leverage(KEYS, HELD, share)[0, 0]
    assert found.tolist() == pytest.approx([0.10960, 0.25394, 0.36855, 0.74713], abs=1e-5)


def test_no_invertible_map_of_the_channels_changes_it() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 30, 4, generator=draw)
    turn = torch.randn(4, 4, generator=draw) + 2 * torch.eye(4)
    held = torch.ones(1, 2, 30, dtype=torch.bool)
    torch.testing.assert_close(
        leverage(keys @ turn, held, 0.0), leverage(keys, held, 0.0), atol=1e-4, rtol=1e-4
    )


def test_empty_slots_and_equal_keys_count_for_nothing() -> None:
    wide = torch.cat([KEYS, torch.full((1, 1, 3, 2), torch.nan)], dim=2)
    held = torch.arange(7).expand(1, 1, 7) < 4
    found = leverage(wide, held, 1e-3)
    torch.testing.assert_close(found[..., :4], leverage(KEYS, HELD, 1e-3))
    assert not found[..., 4:].any()
    assert not leverage(torch.ones(1, 1, 4, 2), HELD, 0.0).any()


def test_blocks_are_those_of_the_dense_formula_with_a_short_one_at_the_end() -> None:
    draw = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 4, 10, 3, generator=draw), torch.randn(1, 2, 10, 3, generator=draw)
    found = within_blocks(query, key, 0.5, 0.0, 4)
    for head in range(2):
        for first, last in ((0, 4), (4, 8), (8, 10)):
            part = slice(first, last)
            every = [
                (0.5 * query[0, n, part] @ key[0, head, part].T).softmax(1).sum(0)
                for n in (2 * head, 2 * head + 1)
            ]
            torch.testing.assert_close(found[0, head, part], sum(every) / 2)


def test_rows_are_standardised_alone() -> None:
    score = torch.tensor([[[1.0, 2, 3, 100]], [[5, 7, 9, 11]]])
    held = torch.tensor([[[True, True, True, False]], [[True] * 4]])
    found = standard(score, held)
    assert found[0, 0, 3] == 0 and float(found[0].sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found[1:], standard(score[1:], held[1:]))
    assert float(found[1].square().mean()) == pytest.approx(1)
