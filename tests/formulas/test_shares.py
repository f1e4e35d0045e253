"""Curves of what rows keep: by hand, and what holds for all of them."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.shares import FRACTIONS, at, curves


def test_a_worked_example() -> None:
    # Sixteen slots in two layers of two heads: the largest score is 15, the least 0.
    score_LHT = torch.tensor([[[15.0, 14, 13, 3], [12, 2, 1, 0]], [[11, 10, 9, 8], [7, 6, 5, 4]]])
    share_LHX = curves(score_LHT)
    quarter = share_LHX[..., FRACTIONS.index(1 / 4)]
    assert quarter.tolist() == [[0.75, 0.25], [0, 0]]
    half = share_LHX[..., FRACTIONS.index(1 / 2)]
    assert half.tolist() == [[0.75, 0.25], [1, 0]]
    # Between them on a line; beyond the last to everything, below the first to nothing.
    assert at(share_LHX, 0.375).tolist() == [[0.75, 0.25], [0.5, 0]]
    last = share_LHX[..., -1]
    torch.testing.assert_close(at(share_LHX, 0.875), (last + 1) / 2)
    torch.testing.assert_close(at(share_LHX, 1 / 128), share_LHX[..., 0] / 2)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.25, 0.6, 0.99, 1.0])
def test_the_mean_is_the_fraction_and_rows_never_shrink(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scale_LH1 = torch.rand(4, 3, 1, generator=generator)
    share_LHX = curves(torch.rand(4, 3, 64, generator=generator) * scale_LH1)
    share_LH = at(share_LHX, fraction)
    assert float(share_LH.mean()) == pytest.approx(fraction, abs=1e-9)
    assert bool((at(share_LHX, min(1.0, fraction + 0.005)) >= share_LH - 1e-12).all())


def test_equal_scores_everywhere_are_equal_shares_in_the_mean_of_texts() -> None:
    score_LHT = torch.rand(2, 2, 256, generator=torch.Generator().manual_seed(1))
    swapped = curves(score_LHT.flip(1)).flip(1)
    torch.testing.assert_close(curves(score_LHT), swapped)
