"""Expected attention: the worked example, and what it must be in simple cases."""

from __future__ import annotations

import helpers
import pytest
import torch

import kvpress
from kvpress.formulas.expected import (
    Moments,
    expected_logits,
    logits,
    mixed_logits,
    moments,
    weights,
)
from kvpress.formulas.rotation import Rotation

SCALING = 2**-0.5
FUTURE_BP = torch.arange(4, 8)[None]


@pytest.fixture
def rotation() -> Rotation:
    return Rotation(torch.tensor([0.5]))


@pytest.fixture
def queries() -> Moments:
    return Moments(torch.tensor([[[1, 0.5]]]), torch.tensor([[[[0.2, 0.05], [0.05, 0.1]]]]))


@pytest.fixture
def key_BHSD(rotation: Rotation) -> torch.Tensor:
    raw = torch.tensor([[[[1.0, 0], [0, 2], [-1, 1], [2, 2]]]])
    return rotation.turn(raw, torch.arange(4)[None, None])


def _weights(logits_BNS: torch.Tensor) -> list[float]:
    return weights(logits_BNS, torch.ones(1, 1, 4, dtype=torch.bool))[0, 0].tolist()


def test_the_worked_example(rotation, queries, key_BHSD):
    turned = queries.through(rotation.mean(FUTURE_BP, 2))
    assert turned.mean_BND[0, 0].tolist() == pytest.approx([-0.94820, -0.06844], abs=1e-5)
    spread = turned.covariance_BNDD[0, 0].diagonal().tolist()
    assert spread == pytest.approx([0.15958, 0.05733], abs=1e-5)
    z_BNS = expected_logits(queries, key_BHSD, FUTURE_BP, rotation, SCALING)
    assert z_BNS[0, 0].tolist() == pytest.approx([-0.63058, 0.63868, 1.01852, 1.34160], abs=1e-5)
    assert _weights(z_BNS) == pytest.approx([0.05901, 0.20996, 0.30698, 0.42405], abs=1e-5)


def test_the_worked_example_without_covariance(rotation, queries, key_BHSD):
    z_BNS = expected_logits(queries, key_BHSD, FUTURE_BP, rotation, SCALING, covariance=False)
    assert _weights(z_BNS) == pytest.approx([0.06437, 0.21987, 0.32251, 0.39325], abs=1e-5)


def test_weights_averaged_over_positions(rotation, queries, key_BHSD):
    z_BNS = mixed_logits(queries, key_BHSD, FUTURE_BP, rotation, SCALING)
    assert _weights(z_BNS) == pytest.approx([0.0430, 0.2105, 0.2277, 0.5188], abs=1e-4)


def test_one_future_position_is_the_exact_rotation(rotation, queries, key_BHSD):
    one = expected_logits(queries, key_BHSD, FUTURE_BP[:, :1], rotation, SCALING)
    mixed = mixed_logits(queries, key_BHSD, FUTURE_BP[:, :1], rotation, SCALING)
    turned = rotation.turn(queries.mean_BND, FUTURE_BP[:, :1])
    exact = (turned[:, :, None] @ key_BHSD.mT)[:, :, 0] * SCALING
    plain = expected_logits(queries, key_BHSD, FUTURE_BP[:, :1], rotation, SCALING, False)
    torch.testing.assert_close(plain, exact)
    torch.testing.assert_close(one, mixed)


def test_moments_are_those_of_queries_before_rotation(rotation):
    generator = torch.Generator().manual_seed(0)
    raw_BNQD = torch.randn(2, 4, 9, 2, generator=generator)
    position_BQ = torch.arange(9) + torch.tensor([[0], [30]])
    found = moments(rotation.turn(raw_BNQD, position_BQ[:, None]), position_BQ, rotation, skip=4)
    for b, part in enumerate((raw_BNQD[0, :, 4:], raw_BNQD[1])):
        torch.testing.assert_close(found.mean_BND[b], part.mean(1))
        for n in range(4):
            exact = torch.cov(part[n].T, correction=0)
            torch.testing.assert_close(found.covariance_BNDD[b, n], exact, atol=1e-5, rtol=1e-4)


def test_the_sign_of_queries_and_keys_cancels():
    generator = torch.Generator().manual_seed(1)
    key_BHSD = torch.randn(1, 2, 5, 4, generator=generator)
    query_BNQD = torch.randn(1, 6, 7, 4, generator=generator)
    of = [moments(x, torch.arange(7)[None], None, 0) for x in (query_BNQD, -query_BNQD)]
    torch.testing.assert_close(logits(of[0], key_BHSD, 0.5), logits(of[1], -key_BHSD, 0.5))


def test_closed_slots_have_no_weight_and_take_none():
    z_BNS = torch.tensor([[[0.0, 5, 1], [0, 5, 2]]])
    weight_BHS = weights(z_BNS, torch.tensor([[[True, False, True]]]))
    alone = z_BNS[..., [0, 2]].softmax(-1).mean(1)
    torch.testing.assert_close(weight_BHS[0, 0, [0, 2]], alone[0])
    assert weight_BHS[0, 0, 1] == 0
    assert not weights(z_BNS, torch.zeros(1, 1, 3, dtype=torch.bool)).any()


def test_positions_in_channels_of_their_own_are_refused() -> None:
    import pytest

    from kvpress.errors import PolicyError

    with pytest.raises(PolicyError, match="ALiBi"):
        kvpress.attach(helpers.tiny("bloom"), "expected_attention")


@torch.no_grad()
def test_the_report_says_so_where_the_queries_of_a_part_of_the_prompt_scored() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 40)
    with kvpress.attach(model, "expected_attention:budget=0.5") as engine:
        whole, parts = engine.new_cache(), engine.new_cache()
        model(ids, past_key_values=whole)
        for part in ids.split(20, dim=1):
            model(part, past_key_values=parts)
    assert not any("queries" in note for note in whole.report().notes)
    assert any("last part's queries" in note for note in parts.report().notes)
