"""Layers that read the keys and values of a layer before them (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from typing import Any

import families
import helpers
import pytest
import torch

import kvpress
from kvpress.errors import KVPressError

ARGUMENTS = {"max_new_tokens": 12, "do_sample": False}


def shared(**fields: Any) -> Any:
    """Six layers, of which the last three read the last sliding and the last full one."""
    types = ["sliding_attention", "full_attention"] * 3
    given = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": types}
    given |= {"sliding_window": 9, "activation_sparsity_pattern": [0.0] * 6}
    return helpers.sharp("gemma3n", **(given | fields))


@pytest.fixture(scope="module")
def model() -> Any:
    if "gemma3n" not in families.FAMILIES:
        pytest.skip("this transformers has no Gemma 3n")
    return shared()


def test_readers_keep_nothing(model: Any) -> None:
    with kvpress.attach(model, "full") as engine:
        model.generate(helpers.prompt(2, 20), **ARGUMENTS)
        kinds = engine.spec.fingerprint.kinds
        assert [kind.index for kind in kinds] == [0, 1, 2]
        assert [kind.readers for kind in kinds] == [0, 2, 1]  # full: 3, 5; sliding: 4
        assert len(engine.report().layers) == 3
        assert all(state.seen is None for state in engine.cache.states)  # nothing is left of it


def test_chunks_turns_and_windows_equal_transformers(model: Any) -> None:
    ids = helpers.prompt(2, 60)
    parts = ids.split([20, 1, 1, 22, 16], 1)
    cache = None
    with torch.no_grad():
        expected = []
        for part in parts:
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits)
        with kvpress.attach(model, "full") as engine:
            ours = engine.new_cache()
            given = [model(part, past_key_values=ours).logits for part in parts]
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.4", "streaming_llm:budget=16"])
def test_a_padded_row_equals_the_row_alone(model: Any, recipe: str) -> None:
    helpers.check_padded_rows(model, recipe, [40, 17, 29])


def test_what_is_evicted_is_gone_for_all_readers(model: Any) -> None:
    """Changed keys of evicted tokens change nothing that comes after."""
    one, two = helpers.prompt(1, 40), helpers.prompt(1, 40)
    with torch.no_grad(), kvpress.attach(model, "streaming_llm:budget=12") as engine:
        outs = []
        for ids in (one, two):
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            for layer, state in enumerate(cache.states):
                if state.kind.window is None:
                    assert len(cache.kept_positions(layer)) == 12
            outs.append(model(ids[:, :1], past_key_values=cache).logits)
        assert torch.equal(*outs)


def test_drafts_equal_plain_decoding(model: Any) -> None:
    ids = helpers.prompt(1, 12).repeat(1, 3)
    plain = model.generate(ids, **ARGUMENTS)
    with kvpress.attach(model, "full"):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **ARGUMENTS), plain)


def test_a_second_look_works(model: Any) -> None:
    ids = helpers.prompt(2, 40)
    with kvpress.attach(model, "kvzip:instruction=,further=,chunk=20") as engine:
        engine.generate(ids, **ARGUMENTS)
        assert engine.cache.check_integrity()


def test_keys_that_were_moved_are_not_taken_for_new_ones(model: Any) -> None:
    """On several devices readers get copies, which do not show where they come from."""
    inner = model.base_model.layers[3].self_attn

    def moved(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states = {k: tuple(x.clone() for x in v) for k, v in kwargs["shared_kv_states"].items()}
        return args, kwargs | {"shared_kv_states": states}

    hook = inner.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        with kvpress.attach(model, "full"), pytest.raises(KVPressError, match="another device"):
            model.generate(helpers.prompt(1, 20), **ARGUMENTS)
    finally:
        hook.remove()


@pytest.mark.parametrize("recipe", ["quest:read=80", "specontext:read=80,head=self"])
def test_reading_in_part_is_refused(model: Any, recipe: str) -> None:
    with pytest.raises(KVPressError, match="share"):
        kvpress.attach(model, recipe)


def test_tiers_are_refused(model: Any) -> None:
    with pytest.raises(KVPressError, match="share"):
        kvpress.attach(model, "full", device="1MiB", host="64MiB")
