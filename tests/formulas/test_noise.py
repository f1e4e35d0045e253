"""The counter-based noise: distribution, independence and reproducibility."""

from __future__ import annotations

import torch

from kvpress.formulas.noise import NO_QUERY, exponential, gumbel, uniform

HEAD, QUERY, KEY = torch.arange(4)[:, None, None], torch.arange(300)[:, None], torch.arange(300)


def test_moments_of_the_gumbel_distribution() -> None:
    z = gumbel(3, 1, HEAD, QUERY, KEY).double()
    assert abs(float(z.mean()) - 0.5772) < 0.01
    assert abs(float(z.std()) - 1.2825) < 0.01
    assert bool(z.isfinite().all())


def test_uniform_in_every_decile_and_never_0_or_1() -> None:
    u = uniform(0, 0, HEAD, QUERY, KEY)
    counts = torch.histc(u, 10, 0, 1) / u.numel()
    assert float((counts - 0.1).abs().max()) < 0.003
    many = uniform(0, 0, torch.tensor(0), torch.arange(4000)[:, None], torch.arange(4000))
    assert float(many.min()) > 0 and float(many.max()) < 1  # 24 bits would round to 1 here


def test_neighbours_are_uncorrelated() -> None:
    u = uniform(0, 2, HEAD, QUERY, KEY).double() - 0.5
    pairs = [(u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1]), (u[1:], u[:-1]), (u[0], u[0].mT)]
    pairs += [
        (u, uniform(1, 2, HEAD, QUERY, KEY) - 0.5),
        (u, uniform(0, 3, HEAD, QUERY, KEY) - 0.5),
    ]
    for a, b in pairs:
        assert abs(float((a * b).mean())) * 12 < 0.02


def test_a_value_depends_on_its_coordinates_alone() -> None:
    whole = gumbel(9, 5, HEAD, QUERY, KEY)
    part = gumbel(9, 5, HEAD[2:3], QUERY[40:50], KEY[7:20])
    assert torch.equal(whole[2:3, 40:50, 7:20], part)
    frozen = gumbel(9, 5, HEAD, torch.full_like(QUERY, NO_QUERY), KEY)
    assert torch.equal(frozen[:, :1].expand_as(frozen), frozen)


def test_seeds_beyond_32_bits_differ() -> None:
    assert not torch.equal(uniform(1, 0, HEAD, QUERY, KEY), uniform(1 + 2**32, 0, HEAD, QUERY, KEY))


def test_exp_of_gumbel_is_one_over_exponential() -> None:
    e, z = exponential(0, 0, HEAD, QUERY, KEY), gumbel(0, 0, HEAD, QUERY, KEY)
    torch.testing.assert_close(z.exp(), 1 / e)
