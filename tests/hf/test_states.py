"""Models of which some layers hold a state: linear attention, state spaces, convolutions.

And those that attend within chunks, which transformers does by itself as well.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.errors import CacheError, CacheFileError, KVPressError, UnsupportedModelError
from kvpress.store import sealed

HYBRIDS = [
    name
    for name in (
        "jamba",
        "bamba",
        "falcon_h1",
        "zamba2",
        "qwen3_next",
        "qwen3_5",
        "lfm2",
        "llama4",
        "kimi_linear",
    )
    if name in families.FAMILIES
]
RECIPE = "keyformer:budget=0.3"
ARGUMENTS = {"max_new_tokens": 10, "do_sample": False}


@torch.no_grad()
def states_of(cache: Any) -> list[torch.Tensor]:
    """Every state of a cache of transformers or of ours."""
    tables: list[dict[int, torch.Tensor]] = []
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            tables += [layer.conv_states, layer.recurrent_states]
        elif hasattr(layer, "columns"):
            tables.append(layer.columns)
        elif getattr(layer, "is_sliding", False):  # transformers' own, for attention in chunks
            tables.append({0: layer.keys, 1: layer.values})
    return [tensor for table in tables for tensor in table.values() if tensor is not None]


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_are_those_of_transformers_and_counted(family: str) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([31, 12, 20], "left")
    own, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=own)
        with kvpress.attach(model, RECIPE) as engine:
            cache = engine.new_cache()
            model(ids, attention_mask=mask, past_key_values=cache)
            sizes.append(engine.report(cache).bytes_states)
            for theirs, ours in zip(states_of(own), states_of(cache), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
            for _ in range(5):
                mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
                model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
            sizes.append(engine.report(cache).bytes_states)
            assert sizes[0] == sizes[1] == sum(x.nbytes for x in states_of(cache)) > 0
            assert "no policy compresses" in str(engine.report(cache))
            assert engine.report(cache).to_dict()["bytes_states"] == sizes[0]


@pytest.mark.parametrize("family", HYBRIDS)
def test_turns_and_chunks_equal_transformers(family: str) -> None:
    """A second turn of a chat goes on from states, in chunks of any size."""
    model, ids = helpers.sharp(family), helpers.prompt(2, 50)
    parts = ids.split([20, 1, 13, 16], 1)
    with torch.no_grad():
        own = DynamicCache(config=model.config)
        expected = [model(part, past_key_values=own).logits for part in parts]
        with kvpress.attach(model, "full") as engine:
            cache = engine.new_cache()
            given = [model(part, past_key_values=cache).logits for part in parts]
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("recipe", ["full", f"{RECIPE}+quant"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_padded_row_equals_the_row_alone(family: str, recipe: str) -> None:
    helpers.check_padded_rows(helpers.sharp(family), recipe, [40, 17, 29])


@pytest.mark.parametrize("family", HYBRIDS)
def test_beams_and_returned_sequences_follow_their_states(family: str) -> None:
    model, (ids, mask) = helpers.sharp(family), helpers.padded([25, 18], "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask, **ARGUMENTS}
    expected = model.generate(ids, **beams)
    with kvpress.attach(model, "full"):
        assert torch.equal(model.generate(ids, **beams), expected)


@pytest.mark.parametrize("copied", ["fork", "deepcopy", "save"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_copies_go_on_alone(family: str, copied: str, tmp_path: Path) -> None:
    model, ids = helpers.sharp(family), helpers.prompt(2, 30)
    one, other = helpers.prompt(2, 6, seed=1), helpers.prompt(2, 6, seed=2)
    with torch.no_grad(), kvpress.attach(model, RECIPE) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        before = [x.clone() for x in states_of(cache)]
        if copied == "save":
            cache.save(tmp_path / "cache")
            twin = engine.load_cache(tmp_path / "cache")
        else:
            twin = cache.fork() if copied == "fork" else copy.deepcopy(cache)
        assert engine.report(twin).bytes_states == engine.report(cache).bytes_states
        first = model(one, past_key_values=twin).logits
        assert all(map(torch.equal, states_of(cache), before))
        second = model(other, past_key_values=cache).logits
        fresh = engine.new_cache()
        model(ids, past_key_values=fresh)
        assert torch.equal(model(other, past_key_values=fresh).logits, second)
        assert not torch.equal(first, second)
        cache.reset()
        assert engine.report(cache).bytes_states == 0
        model(ids[:1], past_key_values=cache)  # a batch of another size


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_pass_that_fails_amid_the_layers_is_noticed(family: str) -> None:
    model, ids = families.tiny(family), helpers.prompt(1, 20)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        for mode in (torch.no_grad, torch.inference_mode):
            cache = engine.new_cache()
            with mode():
                model(ids, past_key_values=cache)
                if model.base_model is not model:  # then it is known when all layers are done
                    hook = model.lm_head.register_forward_pre_hook(_fails)
                    with pytest.raises(ValueError, match="amid"):
                        model(ids[:, :1], past_key_values=cache)
                    hook.remove()
                    model(ids[:, :1], past_key_values=cache)
                layer = getattr(model, "model", model).layers[1]
                hook = layer.register_forward_pre_hook(_fails)
                with pytest.raises(ValueError, match="amid"):
                    model(ids[:, :1], past_key_values=cache)
                hook.remove()
                with pytest.raises(CacheError, match="interrupted"):
                    model(ids[:, :1], past_key_values=cache)
                cache.reset()
                model(ids, past_key_values=cache)


def _fails(*_: Any) -> None:
    raise ValueError("amid the layers")


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_call_that_is_refused_loses_nothing(family: str) -> None:
    model, ids = helpers.sharp(family), helpers.prompt(1, 20)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        cache, fresh = engine.new_cache(), engine.new_cache()
        model(ids, past_key_values=cache)
        model(ids, past_key_values=fresh)
        with pytest.raises(KVPressError):
            model(ids[:, :1], attention_mask=torch.ones(1, 3), past_key_values=cache)
        with pytest.raises(KVPressError):
            model(ids[:, :1], attention_mask=torch.ones(1, 1, 1, 21), past_key_values=cache)
        given = model(ids[:, :3], past_key_values=cache).logits
        assert torch.equal(given, model(ids[:, :3], past_key_values=fresh).logits)


@pytest.mark.parametrize("family", HYBRIDS)
def test_inference_mode_and_other_modes_mix(family: str) -> None:
    model, ids = helpers.sharp(family), helpers.prompt(1, 20)
    with kvpress.attach(model, "full") as engine:
        cache, fresh = engine.new_cache(), engine.new_cache()
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        with torch.no_grad():
            given = [model(ids[:, :3], past_key_values=cache).logits]
            model(ids, past_key_values=fresh)
            given.append(model(ids[:, :3], past_key_values=fresh).logits)
        assert torch.equal(*given)


@pytest.mark.parametrize("family", [x for x in HYBRIDS if x != "llama4"])
def test_sequences_that_ended_early_go_on_as_if_alone(family: str) -> None:
    """What generate() feeds them after their end is not in their states."""
    model, ids = helpers.sharp(family), helpers.prompt(2, 20)
    first, second = model.generate(ids, **ARGUMENTS)[:, 20:].tolist()
    ends = [token for token in second[2:7] if token not in first][:1]
    if not ends:
        pytest.skip("both say the same")
    more = helpers.prompt(2, 6, seed=4)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        out = engine.generate(ids, eos_token_id=ends, **ARGUMENTS)
        cache = engine.cache
        seen, width = cache.ids.real().long(), cache.columns_seen
        said = int(seen[1].sum())
        assert said < width == int(seen[0].sum())
        mask = torch.cat([seen, torch.zeros(2, 1, dtype=torch.long), torch.ones_like(more)], 1)
        mask[0, width] = 1  # its last token was not fed yet
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, width:]
        step = {"attention_mask": mask[:, : width + 1], "position_ids": position[:, :1]}
        model(out[:, width : width + 1], past_key_values=cache, **step)
        turn = {"attention_mask": mask, "position_ids": position[:, 1:]}
        given = model(more, past_key_values=cache, **turn).logits
        alone = engine.new_cache()
        model(ids[1:], past_key_values=alone)
        place = torch.arange(said + 6)[None]  # not every model counts by itself
        for column in range(20, said):
            one = {"position_ids": place[:, column : column + 1]}
            model(out[1:, column : column + 1], past_key_values=alone, **one)
        rest = {"position_ids": place[:, said:]}
        expected = model(more[1:], past_key_values=alone, **rest).logits
    torch.testing.assert_close(given[1:], expected, rtol=1e-3, atol=2e-4)


def test_chunks_are_counted_in_columns_and_that_is_noted() -> None:
    """transformers lets the padding of a sequence that ended move what comes after it."""
    if "llama4" not in HYBRIDS:
        pytest.skip("this transformers has no Llama 4")
    model, ids = families.tiny("llama4"), helpers.prompt(2, 20)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        assert "Padding stood behind tokens" not in str(engine.report())
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[1, 20] = 0
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert "Padding stood behind tokens" in str(engine.report())


def test_padding_behind_tokens_is_noted() -> None:
    model, (ids, mask) = families.tiny("jamba"), helpers.padded([20, 9], "right")
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        model(ids, attention_mask=mask)
        assert "Padding stood behind tokens" in str(engine.report())
        model(ids, attention_mask=mask.flip(1), past_key_values=engine.new_cache())
        assert "Padding stood behind tokens" not in str(engine.report())


def test_layers_are_counted_as_the_model_counts_them() -> None:
    model = families.tiny("jamba")
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        model(helpers.prompt(1, 9))
        assert engine.cache.kept_positions(1) == list(range(9))
        for layer in (0, 2, 3):
            with pytest.raises(CacheError, match=f"layer={layer} does not exist, or has no keys"):
                engine.cache.kept_positions(layer)


@pytest.mark.parametrize("family", HYBRIDS)
def test_tokens_cannot_be_taken_back_from_a_recurrence(family: str) -> None:
    model, ids = families.tiny(family), helpers.prompt(1, 20)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        kept = states_of(cache)[0].clone()
        assert not cache.is_croppable  # nor what was not recorded
        with pytest.raises(CacheError, match="taken back"):
            cache.crop(-2)
        assert cache.get_seq_length() == 20 and torch.equal(states_of(cache)[0], kept)


@pytest.mark.parametrize("family", [x for x in ("lfm2", "llama4") if x in HYBRIDS])
def test_drafts_go_back_where_nothing_is_a_recurrence(family: str) -> None:
    """Prompt lookup gives the tokens of plain decoding."""
    model, ids = helpers.sharp(family), helpers.prompt(1, 12).repeat(1, 3)
    plain = model.generate(ids, **ARGUMENTS)
    with kvpress.attach(model, "full") as engine:
        drafted = model.generate(ids, prompt_lookup_num_tokens=4, **ARGUMENTS)
        assert torch.equal(drafted, plain)
        cache = engine.cache  # what follows is not recorded any more
        if family == "lfm2":
            assert all(x.shape[-1] == model.config.conv_L_cache for x in states_of(cache))
        else:
            assert all(x.shape[2] == 7 for x in states_of(cache))  # of chunks of 8
        longer = torch.cat([drafted, helpers.prompt(1, 3, seed=3)], 1)
        expected = engine.new_cache()
        with torch.no_grad():
            ours = model(longer[:, cache.get_seq_length() :], past_key_values=cache).logits
            theirs = model(longer, past_key_values=expected).logits
        torch.testing.assert_close(ours, theirs[:, -ours.shape[1] :], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_second_look_leaves_states_as_they_were(family: str) -> None:
    model, ids = helpers.sharp(family), helpers.prompt(2, 40)
    look = "kvzip:instruction=,further=,chunk=20"
    with torch.no_grad():
        own = DynamicCache(config=model.config)
        model(ids, past_key_values=own)
        with kvpress.attach(model, look) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            for theirs, ours in zip(states_of(own), states_of(cache), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_state_of_another_shape_is_not_loaded(tmp_path: Path) -> None:
    model, ids, path = families.tiny("falcon_h1"), helpers.prompt(2, 20), tmp_path / "cache"
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        model(ids, past_key_values=engine.new_cache())
        engine.cache.save(path)
        facts, tensors = sealed.read(path)
        states = [name for name in tensors if name.startswith("states.")]
        assert len(states) == 6  # a convolution and a recurrence in each of three layers
        for spoiled in ({states[0]: tensors[states[0]][:1]}, {"states.9.conv_states.0": ids}):
            sealed.write(path, tensors | spoiled, facts)
            with pytest.raises(CacheFileError, match="is no state of 2"):
                engine.load_cache(path)


def test_modules_that_keep_their_state_themselves_are_refused() -> None:
    model = families.tiny("recurrent_gemma")
    with pytest.raises(UnsupportedModelError, match="no cache of transformers"):
        kvpress.attach(model, "full")
