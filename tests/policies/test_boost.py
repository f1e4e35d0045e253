"""Key channels with twice the bits: which ones they are, what they cost, and what goes on alike."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.formulas.boost import sensitive
from kvpress.store.base import KEY

PROMPT, NEW = 200, 12
COARSE = "quant:key_bits=2,value_bits=2,residual=8,guard=none"


def test_channels_are_chosen_by_queries_and_steps_of_slots_that_are_there() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 9, 8, generator=draw), torch.randn(1, 2, 70, 8, generator=draw)
    key[0, 0, :, 5] *= 10  # a wide channel, and one that queries look at
    query[0, 2:, :, 3] *= 10
    held = torch.ones(1, 2, 70, dtype=torch.bool)
    found = sensitive(query, key, held, 32, 2, 2)
    assert 5 in found[0, 0] and 3 in found[0, 1]
    assert bool((found.diff(dim=-1) > 0).all())
    held[..., :20] = False
    key[..., :20, 1] = 1e4  # of slots that are not there
    assert torch.equal(sensitive(query, key, held, 32, 2, 1)[0, :, 0], torch.tensor([5, 3]))


@torch.no_grad()
def test_boosted_keys_are_nearer_and_cost_what_the_layout_says() -> None:
    model, ids = helpers.tiny(head_dim=16, initializer_range=0.3), helpers.prompt(1, PROMPT)
    keys, held, logits = {}, {}, {}
    for recipe in ("full", COARSE, f"{COARSE},boost=0.25"):
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            assert cache.check_integrity()
            keys[recipe] = cache.states[0].rows.dense_by_position([0])[KEY]
            held[recipe] = cache.nbytes, cache.states[0]
            logits[recipe] = model(helpers.prompt(1, 30, seed=1), past_key_values=cache).logits
    exact, plain, boosted = keys.values()
    error = [float((x - exact).square().sum()) for x in (plain, boosted)]
    assert error[1] < 0.85 * error[0]
    full, coarse, finer = logits.values()
    assert float((finer - full).norm()) < float((coarse - full).norm())
    (less, one), (more, other) = held[COARSE], held[f"{COARSE},boost=0.25"]
    layouts = [state.store.aging.parts[0].layout for state in (one, other)]
    assert layouts[1].boosted == 4 and layouts[0].boosted == 0
    pages = one.store.aging.parts[0].paging.pool.pages
    assert pages == other.store.aging.parts[0].paging.pool.pages
    rows = 3 * 2  # layers, KV heads: each row names its channels in 2 bytes
    apart = 3 * pages * (layouts[1].page_bytes - layouts[0].page_bytes) + rows * 4 * 2
    assert more - less == apart


@pytest.mark.parametrize("recipe", [f"{COARSE},boost=0.25", "quant:key_bits=2,boost=0.125"])
def test_a_row_of_a_padded_batch_is_the_row_alone(recipe: str) -> None:
    model = helpers.sharp("llama", head_dim=16)
    ids, mask = helpers.padded([PROMPT, 130, 90], "left")
    together, _ = helpers.decoded(model, recipe, ids, NEW, mask)
    for row in range(3):
        alone = ids[row : row + 1][:, mask[row].bool()]
        assert helpers.decoded(model, recipe, alone, NEW)[0].equal(together[row : row + 1])


@torch.no_grad()
def test_saved_and_forked_caches_go_on_alike_and_files_with_other_channels_are_refused(
    tmp_path: Any,
) -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    recipe = f"h2o:budget=0.8+{COARSE},boost=0.25"
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        fork, file = cache.fork(), tmp_path / "cache"
        cache.save(file)
        loaded = engine.load_cache(file)
        for step in range(8):
            token = helpers.prompt(1, 8, seed=3)[:, step : step + 1]
            wanted = model(token, past_key_values=cache).logits
            assert model(token, past_key_values=fork).logits.equal(wanted)
            assert model(token, past_key_values=loaded).logits.equal(wanted)
        assert loaded.check_integrity()
    with (
        kvpress.attach(model, f"h2o:budget=0.8+{COARSE}") as engine,
        pytest.raises(kvpress.CacheFileError),
    ):
        engine.load_cache(file)


def test_batches_of_requests_tiers_and_short_rows() -> None:
    model, ids = helpers.sharp("llama", head_dim=16), helpers.prompt(1, PROMPT)
    recipe = "quant:key_bits=2,boost=0.25"
    expected, _ = helpers.decoded(model, recipe, ids, NEW)
    tiered, _ = helpers.decoded(model, recipe, ids, NEW, device="256KiB", host="4MiB")
    assert tiered.equal(expected)
    with kvpress.Batcher(model, recipe) as batcher:
        handle = batcher.submit(ids[0].tolist(), max_new_tokens=NEW)
        assert list(handle.result(timeout=60).tokens) == expected[0].tolist()
    _, cache = helpers.decoded(model, f"snapkv:budget=80,window=8+{recipe}", ids, NEW)
    assert cache.check_integrity()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("quant:key_bits=2,boost=0.1,rotate=both", "not turned"),
        ("quant:key_bits=16,boost=0.1", "codes"),
        ("quant:value_bits=16,boost=0.1", "codes"),
        ("think:keep=0.5+quant:boost=0.1", "leaves channels out"),
        ("quest+quant:boost=0.1", "no bounds"),
    ],
)
def test_what_has_no_meaning_is_refused(recipe: str, says: str) -> None:
    with pytest.raises(kvpress.PolicyError, match=says):
        kvpress.attach(helpers.tiny(head_dim=16), recipe)


def test_more_channels_of_codes_than_kernels_know_and_none_are_refused_early() -> None:
    with pytest.raises(kvpress.PolicyError, match="leave boost out"):
        kvpress.attach(helpers.tiny(head_dim=256), "quant:key_bits=2,boost=0.125")
    with pytest.raises(kvpress.PolicyError, match="gives 0 of the 16"):
        kvpress.attach(helpers.tiny(head_dim=16), "quant:key_bits=2,boost=0.03")
