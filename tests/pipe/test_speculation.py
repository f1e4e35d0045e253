"""Speculative decoding: tokens that are rejected leave no trace; the others count as decoded."""

from __future__ import annotations

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import CacheError

STEADY = ["full", "snapkv:budget=0.5,window=8", "streaming_llm:budget=0.5,interval=0"]
EVICTING = ["streaming_llm:budget=0.5", "tova:budget=0.5", "h2o:budget=0.5", "keyformer:budget=0.5"]


def repetitive(tokens: int) -> torch.Tensor:
    """A prompt in which prompt lookup finds candidates."""
    return helpers.prompt(1, 11).repeat(1, 1 + tokens // 11)[:, :tokens]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("recipe", STEADY)
def test_prompt_lookup_gives_the_greedy_tokens(recipe: str, family: str) -> None:
    model, ids = helpers.tiny(family), repetitive(60)
    arguments = {"max_new_tokens": 40, "do_sample": False}
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **arguments)
        kept = helpers.positions(engine.cache)
        given = engine.generate(ids, **arguments, prompt_lookup_num_tokens=5)
        assert torch.equal(given, expected)
        assert torch.equal(model.generate(ids, **arguments, prompt_lookup_num_tokens=5), expected)
        assert engine.cache.check_integrity()
        length = engine.cache.get_seq_length()
        drafted = [[[p for p in row if p < length] for row in layer] for layer in kept]
        assert family != "llama" or helpers.positions(engine.cache) == drafted


@pytest.mark.parametrize("recipe", STEADY)
def test_assisted_decoding_gives_the_greedy_tokens(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 50)
    assistant = helpers.tiny(num_hidden_layers=1)
    arguments = {"max_new_tokens": 24, "do_sample": False}
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **arguments)
        assert torch.equal(engine.generate(ids, **arguments, assistant_model=assistant), expected)
        cache = engine.new_cache()
        again = model.generate(ids, **arguments, past_key_values=cache, assistant_model=assistant)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("recipe", EVICTING)
def test_policies_that_evict_while_decoding_speculate_within_their_budget(recipe: str) -> None:
    model, ids = helpers.tiny(), repetitive(64)
    with kvpress.attach(model, recipe) as engine:
        out = engine.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5)
        cache = engine.cache
        assert out.shape[1] == 64 + 40
        assert cache.check_integrity()
        cache.stop_past_recording()
        with torch.no_grad():
            model(out[:, -1:], past_key_values=cache)
        assert {n for s in cache.states for n in s.store.counts.tolist()} == {(64 + 40) // 2}


@pytest.mark.parametrize("recipe", [*STEADY, *EVICTING])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rejected_tokens_leave_no_trace(recipe: str, family: str) -> None:
    model, ids = helpers.tiny(family), helpers.prompt(2, 40)
    wrong, right = helpers.prompt(2, 37, seed=5), helpers.prompt(2, 3, seed=6)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        caches = [engine.new_cache(), engine.new_cache()]
        for cache, rejected in zip(caches, (0, 37), strict=True):
            model(ids, past_key_values=cache)
            cache.activate_past_recording()
            tokens = torch.cat([right, wrong[:, :rejected]], dim=1)
            model(tokens, past_key_values=cache)
            cache.crop(-(rejected // 2))
            cache.crop(-(rejected - rejected // 2))
            cache.stop_past_recording()
        logits = [model(right[:, :1], past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for b in range(2):
        assert helpers.positions(caches[0], b) == helpers.positions(caches[1], b)
    for a, b in zip(*(cache.states for cache in caches), strict=True):
        assert (
            a.sequences.decoded.tokens_B.tolist() == b.sequences.decoded.tokens_B.tolist() == [4, 4]
        )
        if a.recipe.accumulates:
            masses = [s.store.dense_by_position([0, 1])["mass"] for s in (a, b)]
            torch.testing.assert_close(*masses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.5", "tova:budget=0.5,interval=4"])
@pytest.mark.parametrize("certain", [0, 2])
def test_cropped_drafts_uncount_no_decoded_token(recipe: str, certain: int) -> None:
    """Drafted tokens count once they are final; a crop that goes beyond them reaches decoded ones.

    certain: cropped tokens that were decoded, where the policy can take them back.
    """
    certain = certain if recipe == "full" else 0
    model, ids, step = helpers.tiny(), helpers.prompt(2, 40), helpers.prompt(2, 1, seed=5)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        for _ in range(3):
            model(step, past_key_values=cache)
        cache.activate_past_recording()
        model(helpers.prompt(2, 6, seed=6), past_key_values=cache)
        cache.crop(-4)
        if certain:
            cache.crop(-2 - certain)
        cache.stop_past_recording()
        kept = 0 if certain else 2
        assert cache.states[0].sequences.decoded.tokens_B.tolist() == [3 + kept - certain] * 2
        model(step, past_key_values=cache)
        assert cache.states[0].sequences.decoded.tokens_B.tolist() == [4 + kept - certain] * 2


@pytest.mark.parametrize("recipe", ["h2o:budget=1.0", "keyformer:budget=1.0"])
def test_drafted_tokens_that_stay_add_what_decoded_ones_add(recipe: str) -> None:
    model, ids, tokens = helpers.tiny(), helpers.prompt(2, 40), helpers.prompt(2, 5, seed=6)
    with kvpress.attach(model, recipe + ",interval=0") as engine, torch.no_grad():
        drafted, decoded = engine.new_cache(), engine.new_cache()
        for cache in (drafted, decoded):
            model(ids, past_key_values=cache)
        drafted.activate_past_recording()
        model(tokens, past_key_values=drafted)
        drafted.stop_past_recording()
        for token in tokens.split(1, dim=1):
            model(token, past_key_values=decoded)
        for cache in (drafted, decoded):
            model(tokens[:, :1], past_key_values=cache)
    for a, b in zip(drafted.states, decoded.states, strict=True):
        masses = [s.store.dense_by_position([0, 1])["mass"] for s in (a, b)]
        torch.testing.assert_close(*masses, rtol=1e-3, atol=1e-5)


def test_what_drafted_tokens_attended_to_is_in_the_ledger() -> None:
    model = helpers.tiny()
    with kvpress.attach(model, "h2o") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 40), past_key_values=cache)
        cache.activate_past_recording()
        before = cache.report().bytes_held
        model(helpers.prompt(1, 4), past_key_values=cache)
        state = cache.states[0]
        weights = sum(w.nbytes for w in state.sequences.drafts.blocks)
        assert weights >= 6 * 4 * 24 * 4  # query heads, tokens, slots, bytes
        assert cache.report().layers[0].bytes_held == state.store.memory.nbytes + weights
        assert cache.report().bytes_held >= before + 3 * weights


def test_drafts_of_padded_sequences_are_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 12)
    mask = torch.ones(2, 16)
    mask[0, 12] = 0
    with kvpress.attach(model, "snapkv:window=4") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.activate_past_recording()
        with pytest.raises(CacheError, match="padding among the new tokens"):
            model(helpers.prompt(2, 4), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("recipe", ["snapkv:budget=0.2,window=8", "h2o:budget=0.2"])
def test_a_prompt_after_speculative_decoding_is_a_prompt(recipe: str) -> None:
    model, ids, longer = helpers.tiny(), repetitive(40), helpers.prompt(1, 400)
    for bare in (False, True):
        with kvpress.attach(model, recipe) as engine, torch.no_grad():
            generate = model.generate if bare else engine.generate
            cache = engine.new_cache()
            given = {"past_key_values": cache, "max_new_tokens": 10, "do_sample": False}
            generate(ids, prompt_lookup_num_tokens=3, **given)
            model(longer, past_key_values=cache)
            kept = int(0.2 * cache.get_seq_length())
            assert {n for s in cache.states for n in s.store.counts.tolist()} == {kept}
            cache.reset()
            assert not cache.states[0].context.recording.on


def test_budgets_hold_at_the_end_of_speculative_decoding() -> None:
    model, ids = helpers.tiny(), repetitive(80)
    with kvpress.attach(model, "h2o:budget=24KiB", page_size=1) as engine:
        engine.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=20)
        assert engine.report().bytes_held <= 24 * 1024
