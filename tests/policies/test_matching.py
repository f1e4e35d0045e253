"""Attention Matching: what is read again, what is fitted, and what a cache then does."""

from __future__ import annotations

import copy
import math
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.policy.loading import load_policy
from kvpress.store.base import KEY, VALUE

PROMPT, NEW = 96, 8
SELECTORS = (
    "snapkv:budget=0.25,window=8",
    "h2o:budget=0.25,interval=0",
    "kvzip:budget=0.25,instruction=,further=",
)
FORMS = ("", ":bias=false", ":values=false", ":part=true")


def run(model: Any, recipe: str, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=NEW)
        tokens = helpers.greedy(model, ids, mask, NEW, cache)
    return tokens, cache


def columns(cache: Any, name: str) -> list[torch.Tensor]:
    """A column of every layer, in the order of positions."""
    return [state.rows.dense_by_position([0])[name] for state in cache.states]


def test_pieces_are_spread_over_the_prompt_and_end_with_it() -> None:
    rule = load_policy("matching", again=0.25, piece=5).absorb()
    ids = rule.reference(list(range(100)), 2**31)
    assert ids == [*range(15, 20), *range(35, 40), *range(55, 60), *range(75, 80), *range(95, 100)]
    assert rule.reference(list(range(100)), 7) == [*range(47, 50), *range(96, 100)]
    assert load_policy("matching", again=1.0).absorb().reference([7, 8], 2**31) == [7, 8]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("selector", SELECTORS)
@torch.no_grad()
def test_the_same_slots_stay_and_only_what_may_change_does(selector: str, form: str) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, PROMPT)
    caches = []
    for recipe in (selector, f"{selector}+matching{form}"):
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            caches.append(cache)
            assert cache.check_integrity()
    plain, fitted = caches
    assert helpers.positions(plain) == helpers.positions(fitted)
    width = plain.states[0].key_width
    for before, after in zip(columns(plain, KEY), columns(fitted, KEY), strict=True):
        # Attention over one channel more rounds otherwise, and later layers with it.
        torch.testing.assert_close(after[..., :width], before, atol=1e-4, rtol=1e-4)
        assert after.shape[-1] == width + ("bias=false" not in form)
    pairs = list(zip(columns(plain, VALUE), columns(fitted, VALUE), strict=True))
    changed = max(float((a - b).abs().max()) for a, b in pairs)
    assert (changed > 1e-2) == ("values=false" not in form)
    recent = 8 if "snapkv" in selector else 0
    if recent:  # its window is protected
        for a, b in pairs:
            torch.testing.assert_close(a[:, :, -recent:], b[:, :, -recent:], atol=1e-4, rtol=1e-4)
        assert all(not x[:, :, -recent:, width:].any() for x in columns(fitted, KEY))
    assert any("fitted to what all slots gave" in note for note in fitted.report().notes)


@torch.no_grad()
def test_logits_are_nearer_to_those_of_the_full_cache() -> None:
    model, ids = helpers.tiny(initializer_range=0.1), helpers.prompt(1, 200)
    text, following = ids[:, :160], ids[:, 160:]
    logits = {}
    for recipe in (
        "full",
        "random:budget=0.1,interval=0",
        "random:budget=0.1,interval=0+matching:again=0.5",
    ):
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache()
            model(text, past_key_values=cache)
            logits[recipe] = model(following, past_key_values=cache).logits
    full, dropped, fitted = logits.values()
    assert float((fitted - full).square().mean()) < 0.9 * float((dropped - full).square().mean())


@torch.no_grad()
def test_a_row_of_a_padded_batch_is_the_row_alone() -> None:
    model = helpers.sharp("llama")
    ids, mask = helpers.padded([PROMPT, 60, 3], "left")
    recipe = SELECTORS[0] + "+matching:held_out=0"
    tokens, cache = run(model, recipe, ids, mask)
    for row in range(3):
        alone = ids[row : row + 1][:, mask[row].bool()]
        expected, own = run(model, recipe, alone)
        assert tokens[row : row + 1].equal(expected)
        assert helpers.positions(cache, row) == helpers.positions(own)


@torch.no_grad()
def test_what_evicts_nothing_is_exact() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, PROMPT)
    full, _ = run(model, "full", ids)
    kept, cache = run(model, "snapkv:budget=1.0,window=8+matching", ids)
    assert kept.equal(full)
    assert not any(x[..., -1].any() for x in columns(cache, KEY))


@torch.no_grad()
def test_saved_forked_and_copied_caches_go_on_alike(tmp_path: Any) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, PROMPT)
    following = helpers.prompt(1, 4, seed=5)
    with kvpress.attach(model, SELECTORS[0] + "+matching") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        others = [
            engine.load_cache(tmp_path / "cache.safetensors"),
            cache.fork(),
            copy.deepcopy(cache),
        ]
        expected = model(following[:, :1], past_key_values=cache).logits
        for other in others:
            assert model(following[:, :1], past_key_values=other).logits.equal(expected)


@torch.no_grad()
def test_a_second_turn_is_fitted_to_what_the_first_left() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, PROMPT)
    with kvpress.attach(model, SELECTORS[0] + "+matching") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        first = columns(cache, KEY)[0][..., -1]
        model(helpers.prompt(1, 40, seed=3), past_key_values=cache)
        assert cache.check_integrity()
        assert cache.report().slots_kept[0][0] == [34, 34]
        assert not columns(cache, KEY)[0][..., -1].equal(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_biases(dtype: torch.dtype) -> None:
    model, ids = helpers.sharp("llama").to(dtype), helpers.prompt(1, PROMPT)
    _, cache = run(model, SELECTORS[0] + "+matching:held_out=0", ids)
    biases = columns(cache, KEY)[0][..., -1]
    assert biases.dtype == dtype and bool(biases.any()) and bool(biases.isfinite().all())


@torch.no_grad()
def test_values_are_fitted_beside_packed_slots() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 200)
    kept = {}
    for spec in ("", "+matching:bias=false,held_out=0"):
        with kvpress.attach(model, f"{SELECTORS[2]}{spec}+quant:residual=0") as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            assert cache.check_integrity()
            kept[spec] = (cache.nbytes, columns(cache, VALUE)[0])
    (bytes_plain, plain), (bytes_fitted, fitted) = kept.values()
    assert bytes_plain == bytes_fitted and not plain.equal(fitted)


@torch.no_grad()
def test_the_ledger_counts_one_channel_more() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, PROMPT)
    sizes = {}
    for form in FORMS:
        _, cache = run(model, f"{SELECTORS[0]}+matching{form}", ids)
        sizes[form] = [state.rows.columns[KEY].shape[0] for state in cache.states]
    assert [a - b for a, b in zip(sizes[""], sizes[":bias=false"], strict=True)] == [1] * 3


def test_what_cannot_be_is_refused() -> None:
    model = helpers.tiny()
    for recipe, reason in (
        ("matching", "no budget"),
        ("full+matching", "no budget"),
        ("h2o:budget=0.5,interval=16+matching", "interval=0"),
        ("snapkv+matching+quant", "bias=false"),
        ("d2o+matching", "replace|wait"),
        ("snapkv+matching:bias=false,values=false", "changes nothing"),
        ("snapkv+matching:held_out=1", "held_out"),
        ("snapkv+quest+matching:bias=false", "retrieval"),
    ):
        with pytest.raises(kvpress.PolicyError, match=reason):
            kvpress.attach(model, recipe)
    with pytest.raises(kvpress.PolicyError, match="changes stored slots"):
        kvpress.attach(model, "snapkv+matching:bias=false", device="1MiB", host="64MiB")
    with (
        pytest.raises(kvpress.CacheError, match="ids"),
        kvpress.attach(model, "snapkv:window=8+matching") as engine,
    ):
        embeds = model.get_input_embeddings()(helpers.prompt(1, 40))
        model(inputs_embeds=embeds, past_key_values=engine.new_cache())
    assert math.isclose(load_policy("matching").absorb().bias[0], math.exp(-3))
