"""The regression that predicts scores: a worked example, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from kvpress.formulas.ridge import features, solve, sums
from kvpress.formulas.rotation import Rotation


def test_a_worked_example_by_hand():
    # Feature 0, 2, 4 (standard deviation √(8/3)) beside 1; ln s = 0, 1, 5.
    # Scaled squares: 20/3 · 3/8 = 5/2, 2·√(3/8) = √(3/2), 1; mean of the diagonal: 7/4.
    feature_SX = torch.tensor([[0.0, 1], [2, 1], [4, 1]])
    score_HS = torch.tensor([[0.0, 1, 5]]).exp()
    found = solve(sums(feature_SX, score_HS), penalty=0.0)
    assert found[:, 0].tolist() == pytest.approx([1.25, -0.5])  # ordinary least squares
    # λ = 0.7: (3.2, √1.5; √1.5, 1.7) w = (22/3·√(3/8), 2), the first weight divided by √(8/3).
    found = solve(sums(feature_SX, score_HS), penalty=0.4)
    root, determinant = math.sqrt(1.5), 3.2 * 1.7 - 1.5
    right = (22 / 3 * math.sqrt(3 / 8), 2.0)
    first = (1.7 * right[0] - root * right[1]) / determinant / math.sqrt(8 / 3)
    second = (3.2 * right[1] - root * right[0]) / determinant
    assert found[:, 0].tolist() == pytest.approx([first, second])


def test_features_are_keys_before_rotation_values_norms_and_one():
    rotation = Rotation(torch.tensor([0.5]))
    raw_BHSD = torch.tensor([[[[3.0, 4], [1, 0]], [[0, 2], [0, 1]]]])
    position_BHS = torch.tensor([7, 9]).expand(1, 2, 2)
    value_BHSE = torch.tensor([[[[1.0], [-2]], [[5], [6]]]])
    found = features(rotation.turn(raw_BHSD, position_BHS), value_BHSE, position_BHS, rotation)
    expected = [[3.0, 4, 0, 2, 1, 5, 5, 2, 1, 5, 1], [1, 0, 0, 1, -2, 6, 1, 1, 2, 6, 1]]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_the_order_of_texts_and_the_scale_of_features_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    feature_SX = torch.cat((torch.randn(40, 5, generator=generator), torch.ones(40, 1)), 1)
    score_HS = torch.rand(3, 40, generator=generator)
    whole = solve(sums(feature_SX, score_HS))
    parts = [sums(feature_SX[i:j], score_HS[:, i:j]) for i, j in ((0, 13), (13, 40))]
    torch.testing.assert_close(solve(parts[1].plus(parts[0])), whole)
    by_X = torch.tensor([1.0, 100, 0.01, 7, 3, 1])
    scaled = solve(sums(feature_SX * by_X, score_HS))
    torch.testing.assert_close(scaled * by_X[:, None].double(), whole, rtol=1e-5, atol=1e-8)


def test_a_feature_that_never_changes_leaves_a_solution():
    feature_SX = torch.tensor([[0.0, 2, 1], [1, 2, 1], [2, 2, 1], [5, 2, 1]])
    assert solve(sums(feature_SX, torch.tensor([[1e-9, 0.2, 0.5, 1]]))).isfinite().all()
