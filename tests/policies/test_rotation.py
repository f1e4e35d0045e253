"""Slots that are turned before they are packed: what stays as it was, and what is better."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.formulas.hadamard import turned
from kvpress.store.base import VALUE

PROMPT, NEW = 120, 12
EXACT = "quant:key_bits=16,value_bits=16,residual=0"


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_oss"])
@pytest.mark.parametrize("rotate", ["values", "both"])
def test_without_coarse_codes_tokens_are_those_of_the_full_cache(rotate: str, family: str) -> None:
    model, ids = helpers.sharp(family, head_dim=16), helpers.prompt(1, PROMPT)
    full, _ = helpers.decoded(model, "full", ids, NEW)
    found, cache = helpers.decoded(model, f"{EXACT},rotate={rotate}", ids, NEW)
    assert found.equal(full) and cache.check_integrity()


@torch.no_grad()
def test_values_are_stored_turned_and_logits_move_by_rounding_alone() -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    stored, logits = {}, {}
    for rotate in ("none", "values", "both"):
        with kvpress.attach(model, f"{EXACT},rotate={rotate}") as engine:
            cache = engine.new_cache()
            logits[rotate] = model(ids, past_key_values=cache).logits
            stored[rotate] = cache.states[0].rows.dense_by_position([0])[VALUE]
    torch.testing.assert_close(turned(stored["values"]), stored["none"], atol=1e-5, rtol=1e-5)
    for rotate in ("values", "both"):
        torch.testing.assert_close(logits[rotate], logits["none"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rotate", ["values", "both"])
def test_a_row_of_a_padded_batch_is_the_row_alone(rotate: str) -> None:
    model = helpers.sharp("llama", head_dim=16)
    ids, mask = helpers.padded([PROMPT, 70, 5], "left")
    recipe = f"snapkv:budget=0.5,window=8+quant:key_bits=4,value_bits=2,rotate={rotate}"
    together, cache = helpers.decoded(model, recipe, ids, NEW, mask)
    for row in range(3):
        alone = ids[row : row + 1][:, mask[row].bool()]
        expected, own = helpers.decoded(model, recipe, alone, NEW)
        assert together[row : row + 1].equal(expected)
        assert helpers.positions(cache, row) == helpers.positions(own)


@pytest.mark.parametrize(
    "scorer",
    [
        *("keydiff", "knorm", "cur", "expected_attention", "compactor", "h2o:interval=0"),
        *("snapkv:window=8+criticalkv", "kvzip:instruction=,further=,normalise=true"),
    ],
)
@torch.no_grad()
def test_scorers_see_keys_and_values_as_they_came(scorer: str) -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    head, plus, tail = scorer.partition("+")
    scorer = f"{head}{',' if ':' in head else ':'}budget=0.5{plus}{tail}"
    kept = []
    for rotate in ("none", "both"):
        with kvpress.attach(model, f"{scorer}+{EXACT},rotate={rotate}") as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            kept.append(helpers.positions(cache))
    same = [
        len(set(a) & set(b)) / len(a)
        for ours, theirs in zip(*kept, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert min(same) > 0.97  # but for ties that rounding decides


@torch.no_grad()
def test_saved_and_forked_caches_go_on_alike_and_others_are_refused(tmp_path: Any) -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    token, file = helpers.prompt(1, 1, seed=5), tmp_path / "cache.safetensors"
    with kvpress.attach(model, "quant:value_bits=2,rotate=values") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(file)
        others = [engine.load_cache(file), cache.fork()]
        expected = model(token, past_key_values=cache).logits
        for other in others:
            assert model(token, past_key_values=other).logits.equal(expected)
    with (
        kvpress.attach(model, "quant:value_bits=2") as engine,
        pytest.raises(kvpress.CacheFileError),
    ):
        engine.load_cache(file)


@torch.no_grad()
def test_large_channels_cost_less_and_bytes_are_the_same() -> None:
    """Values with one channel that is thirty times as large as the others."""
    model, ids = helpers.tiny(head_dim=16, initializer_range=0.1), helpers.prompt(1, 200)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[::16] *= 30
    logits, held = {}, {}
    for recipe in (
        "full",
        "quant:value_bits=2,key_bits=16",
        "quant:value_bits=2,key_bits=16,rotate=values",
    ):
        with kvpress.attach(model, recipe + (",guard=none" if "quant" in recipe else "")) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            held[recipe] = cache.nbytes
            logits[recipe] = model(helpers.prompt(1, 20, seed=1), past_key_values=cache).logits
    full, plain, spread = logits.values()
    assert float((spread - full).norm()) < 0.8 * float((plain - full).norm())
    assert len(set(list(held.values())[1:])) == 1


@torch.no_grad()
def test_packed_slots_are_off_by_half_a_step_of_their_codes_at_most() -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    stored = {}
    for recipe in (f"{EXACT},rotate=both", "quant:residual=0,guard=none,rotate=both"):
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            stored[recipe] = cache.states[0].rows.dense_by_position([0])[VALUE]
    exact, packed = stored.values()
    old = (packed != exact).any(-1, keepdim=True)  # all but those that wait for a page
    step = (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / 15
    assert float(old.float().mean()) > 0.4
    assert bool(((packed - exact).abs() <= 0.51 * step + 1e-2).all())


@torch.no_grad()
def test_the_guard_judges_turned_codes() -> None:
    model, ids = helpers.tiny(head_dim=16, initializer_range=0.3), helpers.prompt(1, 150)
    found = {}
    for rotate in ("none", "both"):
        for bound in (0.0, 1e9):
            recipe = f"quant:key_bits=2,value_bits=2,residual=8,guard={bound},rotate={rotate}"
            with kvpress.attach(model, recipe) as engine:
                cache = engine.new_cache()
                model(ids, past_key_values=cache)
                wide = cache.states[0].store.aging.decided.format_R.tolist()
                found[rotate, bound] = set(map(bool, wide))
    for rotate in ("none", "both"):
        assert found[rotate, 0.0] == {True} and found[rotate, 1e9] == {False}


def test_batches_of_requests_and_tiers_turn_too() -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    recipe = "quant:key_bits=4,value_bits=4,rotate=both"
    expected, _ = helpers.decoded(model, recipe, ids, NEW)
    tiered, _ = helpers.decoded(model, recipe, ids, NEW, device="256KiB", host="4MiB")
    assert tiered.equal(expected)
    with kvpress.Batcher(model, recipe) as batcher:
        handles = [batcher.submit(ids[0].tolist(), max_new_tokens=NEW) for _ in range(3)]
        for handle in handles:
            assert list(handle.result(timeout=60).tokens) == expected[0].tolist()


def test_what_cannot_be_turned_is_refused() -> None:
    with pytest.raises(kvpress.PolicyError, match="leaves channels out"):
        kvpress.attach(helpers.tiny(head_dim=16), "think:keep=0.5+quant:rotate=values")
    with pytest.raises(kvpress.PolicyError, match="of a latent"):
        kvpress.attach(helpers.tiny("deepseek_v3"), "quant:rotate=values")
    with pytest.raises(kvpress.PolicyError, match="at least 16"):
        kvpress.attach(helpers.tiny(head_dim=8), "quant:rotate=both")
