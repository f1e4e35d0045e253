"""Latent attention (MLA): one latent per token is stored, and never expanded."""

from __future__ import annotations

from pathlib import Path

import families
import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.errors import UnsupportedModelError
from kvpress.hf import latent

LATENT = [x for x in ("deepseek_v2", "deepseek_v3", "minicpm3") if x in families.FAMILIES]
ARGUMENTS = {"max_new_tokens": 10, "do_sample": False}


@pytest.mark.parametrize("family", LATENT)
def test_what_is_stored_is_what_transformers_caches(family: str) -> None:
    model, ids = families.tiny(family), helpers.prompt(2, 30)
    with torch.no_grad():
        own = DynamicCache(config=model.config)
        model(ids, past_key_values=own)
        with kvpress.attach(model, "full") as engine:
            model(ids)
            report, states = engine.report(), engine.cache.states
    for layer, state, theirs in zip(report.layers, states, own.layers, strict=True):
        columns = state.rows.dense_by_position([0, 1])
        key = torch.cat([theirs.keys, theirs.values], -1)  # the latent, and what turns
        torch.testing.assert_close(columns["key"], key)
        torch.testing.assert_close(columns["value"], theirs.keys)
        assert layer.bytes_full == theirs.keys.nbytes + theirs.values.nbytes
        assert layer.slots_kept == [[30]] * 2


@pytest.mark.parametrize("family", LATENT)
def test_queries_meet_latents_as_they_meet_expanded_keys(family: str) -> None:
    """Worked on one layer's own weights: products and outputs are those of expanded heads."""
    module = families.tiny(family).base_model.layers[1].self_attn
    rank, turned = module.kv_lora_rank, module.qk_rope_head_dim
    one, two = torch.randn(2, 1, 7, rank), torch.randn(2, 1, 7, turned)
    query = torch.randn(2, 6, 3, module.qk_nope_head_dim + turned)
    key, value = module.expand_kv(one, two)
    own = latent.to_latents(module, query, rank)
    logits = own @ latent.joined(one, two).mT
    torch.testing.assert_close(logits, query @ key.mT, rtol=1e-4, atol=1e-5)
    weights = logits.softmax(-1)
    out = latent.from_latents(module, weights @ one)
    torch.testing.assert_close(out, weights @ value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.4+quant", "h2o:budget=0.5"])
@pytest.mark.parametrize("family", LATENT)
def test_a_padded_row_equals_the_row_alone(family: str, recipe: str) -> None:
    helpers.check_padded_rows(helpers.sharp(family), recipe, [40, 17, 29])


def test_rotated_keys_are_found_behind_the_latent() -> None:
    model = helpers.sharp("deepseek_v3")
    with kvpress.attach(model, "expected_attention:budget=0.5") as engine:
        engine.generate(helpers.prompt(1, 40), **ARGUMENTS)
        turns = engine.spec.rotations
        assert all(turn is not None and turn.start == 16 for turn in turns)  # the rank


def test_drafts_chats_and_files(tmp_path: Path) -> None:
    model, ids = helpers.sharp("minicpm3"), helpers.prompt(1, 12).repeat(1, 3)
    plain = model.generate(ids, **ARGUMENTS)
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **ARGUMENTS), plain)
        cache = engine.cache
        cache.save(tmp_path / "cache")
        longer = torch.cat([plain, helpers.prompt(1, 4, seed=5)], 1)
        expected = engine.generate(longer, cache=cache.fork(), **ARGUMENTS)
        again = engine.load_cache(tmp_path / "cache")
        assert torch.equal(engine.generate(longer, cache=again, **ARGUMENTS), expected)
    assert torch.equal(model.generate(longer, **ARGUMENTS), expected)


def test_weights_that_cannot_be_read_are_refused() -> None:
    model = families.tiny("deepseek_v3")
    own = model.base_model.layers[1].self_attn
    own.kv_b_proj = torch.nn.Sequential(own.kv_b_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\].*plain linear"):
        kvpress.attach(model, "full")


def test_a_pass_that_failed_before_attention_is_forgotten() -> None:
    model, ids = families.tiny("deepseek_v3"), helpers.prompt(1, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with kvpress.attach(model, "full") as engine:
            own = model.base_model.layers[0].self_attn
            own.expand_kv = _fails
            with pytest.raises(ValueError, match="expanded"):
                model(ids, past_key_values=engine.new_cache())
            del own.expand_kv
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def _fails(*_: object) -> None:
    raise ValueError("not expanded")


def test_observations_relative_to_values_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1, 2\]"):
        kvpress.attach(families.tiny("deepseek_v3"), "kvzip:normalise=true")
