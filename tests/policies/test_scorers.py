"""Policies that score by what is stored: their worked examples and properties."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.policy import EMPTY, Slots
from kvpress.policy.loading import load_policy


def drawn(rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, rows, tokens, 6, generator=draw) for _ in range(2))
    return key, value


# ---- KeyDiff


def test_keys_far_from_the_mean_of_unit_keys_stay() -> None:
    keys = [[1, 0], [2, 0.2], [0, 3], [-1, 0.1]]
    found = load_policy("keydiff").score(helpers.shown(keys))[0, 0]
    assert found.tolist() == pytest.approx([-0.64050, -0.71373, -0.76796, 0.56090], abs=1e-5)
    # Longer keys count no more than others: the mean of raw keys would rank them otherwise.
    longer = [[5, 0], [2, 0.2], [0, 3], [-1, 0.1]]
    torch.testing.assert_close(load_policy("keydiff").score(helpers.shown(longer))[0, 0], found)


# ---- CUR


def test_shares_of_windows_are_multiplied() -> None:
    keys = [[5**0.5, 0], [3, 0], [2**0.5, 0], [8**0.5, 0]]
    values = [[1, 0], [1, 0], [2, 0], [2**0.5, 0]]
    found = load_policy("cur", window=2).score(helpers.shown(keys, values))[0, 0]
    # Means where the example has sums: 2 · 2 times as much.
    assert found.tolist() == pytest.approx(
        [4 * x for x in (0.17857, 0.32143, 0.13333, 0.26667)], abs=1e-4
    )
    only = load_policy("cur", window=2, of="keys").score(helpers.shown(keys, values))[0, 0]
    assert only.tolist() == pytest.approx([10 / 14, 18 / 14, 4 / 10, 16 / 10], abs=1e-5)


def test_a_last_window_that_is_not_full_joins_the_one_before() -> None:
    key, value = drawn(2, 7)
    found = load_policy("cur", window=3).score(helpers.shown(key, value))
    square = key.square().sum(-1), value.square().sum(-1)
    last = torch.stack([x[..., 3:] / x[..., 3:].mean(-1, keepdim=True) for x in square]).prod(0)
    torch.testing.assert_close(found[..., 3:], last)


# ---- LagKV


def test_partitions_are_normalised_by_the_next_one() -> None:
    keys = [[0, 1], [4, 1], [0, 0], [2, 2]]
    policy = load_policy("lagkv", sink=0, lag=2, cross=True)
    found = policy.score(helpers.shown(keys))[0, 0]
    assert found[:2].tolist() == pytest.approx([0.33024, 0.66976], abs=1e-5)
    assert float(found[2:].min()) > float(found[:2].max())
    ranks = load_policy("lagkv", sink=0, lag=2).score(helpers.shown(keys))[0, 0]
    assert ranks[:2].tolist() == [0.0, 0.5]


def test_short_texts_keep_their_last_tokens_and_flat_channels_count_for_nothing() -> None:
    key, value = drawn(1, 40)
    score = load_policy("lagkv", sink=4, lag=32).score(helpers.shown(key, value))[0, 0]
    assert score.argsort().tolist() == list(range(40))
    key[..., 3] = 1.0  # a channel that never changes
    flat = load_policy("lagkv", sink=4, lag=8, cross=True).score(helpers.shown(key, value))
    assert bool(flat.isfinite().all())
    key[..., 3] = 5.0
    torch.testing.assert_close(
        load_policy("lagkv", sink=4, lag=8, cross=True).score(helpers.shown(key, value)), flat
    )


def test_partitions_go_by_the_slots_of_a_row_whatever_stands_beside_it() -> None:
    key, value = drawn(2, 44)
    places = torch.arange(44).expand(1, 2, 44).clone()
    places[0, 1, 30:] = EMPTY
    policy = load_policy("lagkv", sink=4, lag=8)
    both = policy.score(helpers.shown(key, value, places))
    alone = policy.score(helpers.shown(key[:, 1:, :30], value[:, 1:, :30]))
    torch.testing.assert_close(both[:, 1:, :30], alone)


# ---- ChunkKV


def chosen(score: torch.Tensor, keep: Any, protected: Any = (), **options: Any) -> list[list[int]]:
    shown = helpers.shown(torch.zeros(*score.shape, 2))
    guarded = torch.zeros_like(score, dtype=torch.bool)
    guarded[..., list(protected)] = True
    keep = torch.as_tensor(keep).expand(score.shape[:2])
    kept = load_policy("chunkkv", **options).select(shown, score, guarded, keep)
    return [row.nonzero().flatten().tolist() for row in kept[0]]


def test_whole_chunks_stay_the_same_of_all_heads() -> None:
    score = torch.tensor([[[0, 9, 1, 1, 4, 4, 0, 0], [0, 0, 5, 5, 4, 4, 0, 0.0]]])
    assert chosen(score, 4, chunk=2) == [[2, 3, 4, 5]] * 2  # 2 + 10, 8 + 8 against 9 + 0
    # The last chunk that finds room gives its best slots; rows may keep different numbers.
    (first, second) = chosen(score, [[3, 5]], chunk=2)
    assert (
        len(first) == 3
        and {4, 5} <= set(first)
        and len(second) == 5
        and {2, 3, 4, 5} <= set(second)
    )


def test_protected_slots_are_no_part_of_a_chunk() -> None:
    score = torch.tensor([[[0, 100.0, 1, 1, 2, 2]]])
    assert chosen(score, 3, protected=[1], chunk=2) == [[1, 4, 5]]


def test_chunks_of_one_token_are_the_scores_summed_over_heads() -> None:
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(1, 2, 30, generator=draw)
    best = score.sum(1)[0].topk(11).indices.sort().values.tolist()
    assert chosen(score, 11, chunk=1) == [best, best]


@torch.no_grad()
def test_it_goes_with_any_scorer_and_with_budgets_per_row() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 80)
    for recipe in (
        "snapkv:budget=0.25,window=8+chunkkv:chunk=5",
        "knorm:budget=0.25+chunkkv+quant",
    ):
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            assert cache.report().slots_kept[0][0] == [20, 20]


# ---- Compactor


@torch.no_grad()
def test_leverage_and_attention_of_blocks_are_weighed() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 60)
    kept = {}
    for weight in ("none", "0", "100"):
        with kvpress.attach(model, f"compactor:budget=0.25,block=16,weight={weight}") as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            kept[weight] = helpers.positions(cache)
            assert cache.report().slots_kept[0][0] == [15, 15]
    assert kept["none"] != kept["0"] != kept["100"]


def test_the_weight_is_the_share_that_goes() -> None:
    shown = helpers.shown(torch.zeros(1, 1, 100, 2))
    for budget, weight in ((0.25, 0.75), (20, 0.8), (1000, 0.0), ("1MiB", 0.35)):
        found = load_policy("compactor", budget=budget)._weight(shown)
        assert float(found) == pytest.approx(weight)


# ---- random


def survivors(draw: str, steps: int, keep: int) -> list[int]:
    """Positions that stay when one token comes and one goes at a time."""
    policy = load_policy("random", draw=draw)
    places = list(range(keep))
    for position in range(keep, keep + steps):
        places.append(position)
        shown = helpers.shown(torch.zeros(1, 1, keep + 1, 2), positions=places)
        places.pop(int(policy.score(shown)[0, 0].argmin()))
    return places


def test_a_frozen_draw_is_a_fair_sample_and_a_fresh_one_favours_what_came_last() -> None:
    ages = {}
    for draw in ("frozen", "fresh"):
        kept = survivors(draw, 200, 16)
        ages[draw] = sum(position >= 166 for position in kept) / 16
    assert ages["frozen"] < 0.55 < 0.8 < ages["fresh"]  # expected: 0.25 and 0.95
    assert survivors("fresh", 40, 8) == survivors("fresh", 40, 8)


@torch.no_grad()
def test_a_protected_prompt_stays_and_decoded_tokens_go_at_random() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 20)
    with kvpress.attach(model, "random:budget=28,draw=fresh") as engine:
        cache = engine.new_cache(protect=20, max_new_tokens=30)
        helpers.greedy(model, ids, torch.ones_like(ids), 30, cache)
        for row in (row for layer in helpers.positions(cache) for row in layer):
            assert row[:20] == list(range(20)) and len(row) == 28


# ---- CriticalKV


def by_two_stages(
    score: Any, norm: Any, keep: int, protected: Any = (), **options: Any
) -> set[int]:
    """What stays of a row, |W v| being given: values are the norms, W is 1."""
    score = torch.tensor(score)[None, None]
    value = torch.tensor(norm)[:, None]
    shown = helpers.shown(torch.zeros(len(value), 1), value, gram_NEF=torch.ones(1, 1, 1))
    guarded = torch.zeros_like(score, dtype=torch.bool)
    guarded[..., list(protected)] = True
    policy = load_policy("criticalkv", **options)
    kept = policy.select(shown, score, guarded, torch.tensor([[keep]]))
    return set(kept[0, 0].nonzero().flatten().tolist())


def test_half_goes_by_attention_and_the_rest_by_what_it_adds() -> None:
    score, norm = [0.5, 0.3, 0.1, 0.06, 0.04], [1.0, 1, 2, 6, 10]
    assert by_two_stages(score, norm, 3) == {0, 3, 4}
    assert by_two_stages(score, norm, 3, first=1) == {0, 1, 2}
    assert by_two_stages(score, norm, 3, first=0) == {0, 3, 4}
    assert by_two_stages(score, norm, 3, protected=[1, 2]) == {0, 1, 2}
    for factor in (1e-3, 1e3):  # of the projection
        assert by_two_stages(score, [factor * x for x in norm], 3) == {0, 3, 4}
    with pytest.raises(kvpress.PolicyError, match="below 0"):
        by_two_stages([-0.5, 0.3], [1.0, 1], 1)


@torch.no_grad()
def test_norms_are_those_of_the_models_own_projection() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 60)
    with kvpress.attach(model, "snapkv:budget=0.5,window=8+criticalkv") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        (state, *_) = cache.states
        assert cache.report().slots_kept[0][0] == [30, 30]
        weight = model.model.layers[0].self_attn.o_proj.weight
        value = state.rows.dense_by_position([0])["value"]
        gram = engine.spec.grams[0]
    heads, group, width = value.shape[1], gram.shape[0] // value.shape[1], value.shape[-1]
    shown = helpers.shown(
        torch.zeros(*value.shape[:3], 2), positions=torch.arange(30).expand(1, heads, 30)
    )
    shown = Slots(**{**vars(shown), "fetch": lambda name: value, "gram_NEF": gram})
    for head in range(heads * group):
        own = weight[:, head * width : (head + 1) * width]
        expected = (value[0, head // group] @ own.T).norm(dim=-1)
        torch.testing.assert_close(shown.output_norms_BNS[0, head], expected, rtol=1e-4, atol=1e-5)


def test_models_without_a_plain_projection_are_refused() -> None:
    model = helpers.tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
    with pytest.raises(kvpress.UnsupportedModelError, match="output projection"):
        kvpress.attach(model, "snapkv+criticalkv")
