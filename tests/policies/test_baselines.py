"""The published baselines against their definitions, worked out by hand."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.policy.base import stages_of
from kvpress.policy.loading import load_policy
from kvpress.policy.slots import Slots


def slots(position: list[list[int]], seen: int, **fields: Any) -> Slots:
    """One sequence with one row of slots per head."""
    columns = {name: fields.pop(name) for name in ("key", "value") if name in fields}
    where = torch.tensor(position)[None]
    return Slots(0, where, torch.tensor([seen]), 1, columns.__getitem__, **fields)


def attention(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """transformers' own attention weights of one layer, `[B, N, Q, P]`."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[layer]
    model.set_attn_implementation("sdpa")
    return weights


def kept(model: Any, recipe: str, ids: torch.Tensor) -> list[list[list[int]]]:
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        model(ids)
        return helpers.positions(engine.cache)


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    wanted = [0, 1, 2, *range(23, 40)]
    assert kept(model, "streaming_llm:budget=20,sink=3", ids) == [[wanted] * 2] * 3


def test_knorm_keeps_the_smallest_keys() -> None:
    key = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [1.0, 1.0], [-2.0, 0.0]]])[None]
    score = load_policy("knorm").score(slots([[0, 1, 2, 3]], 4, key=key))
    torch.testing.assert_close(score, -torch.tensor([[[5.0, 1.0, 2**0.5, 2.0]]]))


@pytest.mark.parametrize("layer", [0, 2])
def test_h2o_ranks_by_the_column_sums_of_transformers_attention(layer: int) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    sums = attention(model, ids, layer)[0].sum(1).view(2, 3, 40).sum(1)
    for head, row in enumerate(kept(model, "h2o:budget=20", ids)[layer]):
        best = sums[head, :30].topk(10).indices.sort().values.tolist()
        assert row == best + list(range(30, 40))


def test_tova_ranks_by_the_last_query_averaged_over_heads() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    mean = attention(model, ids, 1)[0, :, -1].mean(0)
    best = mean[:39].topk(11).indices.sort().values.tolist()
    assert kept(model, "tova:budget=12", ids)[1] == [[*best, 39]] * 2


def test_tova_averages_over_heads_whose_slots_lie_in_different_orders() -> None:
    observed = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 7.0, 6.0]]])
    score = load_policy("tova").score(slots([[0, 1, 2], [2, 0, 1]], 3, attention_BHS=observed))
    assert score.tolist() == [[[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]]


def test_snapkv_pools_the_votes_of_the_window() -> None:
    observed = torch.tensor([[[0.0, 5.0, 0.0, 1.0, 0.0, 0.0, 9.0, 9.0]]])
    policy = load_policy("snapkv", window=2, pool=3)
    score = policy.score(slots([list(range(8))], 8, attention_BHS=observed))
    assert score.tolist() == [[[5.0, 5.0, 5.0, 1.0, 1.0, 0.0, 0.0, 0.0]]]
    assert policy.limits is not None and (policy.limits.recent, policy.limits.interval) == (2, 0)


def test_snapkv_votes_are_the_window_of_transformers_attention() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    weights = attention(model, ids, 1)[0, :, -8:, :32].sum(1).view(2, 3, 32).sum(1)
    votes = torch.nn.functional.max_pool1d(weights[None], 5, 1, 2)[0]
    for head, row in enumerate(kept(model, "snapkv:budget=20,window=8,pool=5", ids)[1]):
        order = votes[head].sort(descending=True, stable=True).indices[:12]
        assert row == order.sort().values.tolist() + list(range(32, 40))


def test_random_differs_by_layer_head_and_seed_and_is_spread_evenly() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 1000)
    rows = [row for heads in kept(model, "random:budget=0.5,recent=0", ids) for row in heads]
    assert len({tuple(row) for row in rows}) == 6
    assert all(200 < sum(p < 500 for p in row) < 300 for row in rows)
    again = [
        row for heads in kept(model, "random:budget=0.5,recent=0,seed=1", ids) for row in heads
    ]
    assert again != rows


def test_full_replaces_nothing() -> None:
    assert stages_of(load_policy("full")) == set()
    assert load_policy("full").limits is None
