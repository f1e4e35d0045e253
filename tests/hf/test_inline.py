"""Models that compute attention by themselves: Falcon, MPT, BLOOM, and their ALiBi."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.errors import KVPressError, MaskError, UnsupportedModelError
from kvpress.hf.inline import Keys
from kvpress.pipe.state.channels import CHANNELS, with_positions
from kvpress.pipe.state.tokens import Tokens

INLINE = ["bloom", "falcon", "falcon-alibi", "falcon-new", "mpt"]
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False}


def test_these_are_the_families_without_an_attention_function() -> None:
    found = []
    for name in families.FAMILIES:
        with torch.device("meta"):
            if not families.tiny(name)._can_set_attn_implementation():
                found.append(name)
    assert found == INLINE


@torch.no_grad()
@pytest.mark.parametrize("family", ["mpt", "falcon", "falcon-new"])
def test_evicted_tokens_are_as_if_masked_and_the_others_keep_their_distance(family: str) -> None:
    """transformers' mask leaves the positions of these families as they are, as eviction does."""
    model, ids = families.tiny(family), helpers.prompt(2, 40)
    own, token = DynamicCache(config=model.config), helpers.prompt(2, 1, seed=1)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[:, 4:28] = 0
    model(ids, past_key_values=own, use_cache=True)
    place = {} if family == "mpt" else {"position_ids": torch.tensor([[40]])}
    expected = model(token, past_key_values=own, attention_mask=mask, **place).logits
    with kvpress.attach(model, "streaming_llm:budget=16,sink=4,interval=0") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        assert helpers.positions(cache)[0][0] == [*range(4), *range(28, 40)]
        given = model(token, past_key_values=cache).logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", INLINE)
def test_policies_see_the_keys_of_the_model_and_nothing_else(family: str) -> None:
    """A norm with the channels that hold positions in it would keep the first tokens."""
    model, ids = families.tiny(family), torch.arange(2, 42)[None]  # no two keys are equal
    own = DynamicCache(config=model.config)
    model(ids, past_key_values=own, use_cache=True)
    with kvpress.attach(model, "knorm:budget=10") as engine:
        model(ids)
        kept, kinds = helpers.positions(engine.cache), engine.spec.fingerprint.kinds
    for layer, kind, rows in zip(own.layers, kinds, kept, strict=True):
        keys = layer.keys[0, :: layer.keys.shape[1] // kind.heads]
        best = keys.norm(dim=-1).topk(10, largest=False).indices
        assert rows == [sorted(row) for row in best.tolist()]


@pytest.mark.parametrize("recipe", ["full", "h2o:budget=0.5", "tova:budget=0.5"])
@pytest.mark.parametrize("family", INLINE)
def test_saved_and_forked_caches_go_on_alike(family: str, recipe: str, tmp_path: Path) -> None:
    model, ids = families.tiny(family), helpers.prompt(1, 30)
    token = helpers.prompt(1, 1, seed=1)
    with torch.no_grad(), kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        caches = [engine.load_cache(tmp_path / "cache"), cache.fork(), cache]
        first, second, third = (model(token, past_key_values=x).logits for x in caches)
        assert cache.check_integrity()
    assert torch.equal(first, second) and torch.equal(first, third)


@torch.no_grad()
@pytest.mark.parametrize("family", INLINE)
def test_a_pass_without_a_cache_returns_none(family: str) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([30, 21], "right")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    with kvpress.attach(model, "h2o:budget=0.5"):
        given = model(ids, attention_mask=mask, use_cache=False)
        bare = model(ids, attention_mask=mask, use_cache=False, return_dict=False)
    assert given.past_key_values is None and len(bare) == 1
    real = mask.bool()
    for logits in (given.logits, bare[0]):
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", INLINE)
def test_detaching_leaves_the_model_as_it_was(family: str) -> None:
    model, ids = families.tiny(family), helpers.prompt(2, 30)
    before, expected = model.config._attn_implementation, model.generate(ids, **ARGUMENTS)
    with kvpress.attach(model, "full"), pytest.raises(KVPressError, match="already attached"):
        kvpress.attach(model, "full")
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, **ARGUMENTS), expected)


@pytest.mark.parametrize("family", INLINE)
def test_what_cannot_be_honoured_is_refused(family: str) -> None:
    model, ids = families.tiny(family), helpers.prompt(1, 8)
    with kvpress.attach(model, "full"):
        with pytest.raises(UnsupportedModelError, match="asks for output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(MaskError, match="Only 2-D padding masks"):
            model(ids, attention_mask=torch.ones(1, 1, 8, 8))
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
            if hasattr(module, "attn_dropout_p"):
                module.attn_dropout_p = 0.1
        if family not in ("falcon", "falcon-new"):  # they have no dropout there
            with pytest.raises(UnsupportedModelError, match=r"dropout.*model\.eval"):
                model(ids)


def test_generating_with_an_engine_uses_its_cache_whatever_the_default_of_the_model_is() -> None:
    model, ids = families.tiny("mpt"), helpers.prompt(2, 30)
    assert not model.config.use_cache
    with kvpress.attach(model, "h2o:budget=10") as engine:
        engine.generate(ids, **ARGUMENTS)
        assert engine.report().slots_kept[0] == [[10] * 6] * 2
        with pytest.raises(KVPressError, match="Leave the option out"):
            engine.generate(ids, use_cache=False, **ARGUMENTS)


def test_packed_sequences_are_refused() -> None:
    model, position = families.tiny("falcon"), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with kvpress.attach(model, "full"), pytest.raises(MaskError, match="packed sequences"):
        model(helpers.prompt(1, 6), position_ids=position, use_cache=False)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (lambda q, k: torch.cat([k, k]), "cat"),
        (lambda q, k: torch.tanh(q @ k), "tanh"),
        (lambda q, k: (q @ k) * torch.ones(3), "a product with a tensor"),
        (lambda q, k: (q @ k) + torch.ones(3, 3), "a bias"),
        (lambda q, k: (q @ k).masked_fill(torch.ones(1, 1, 3, 3).bool(), 0), "a mask of its own"),
    ],
)
def test_an_unknown_operation_is_refused_by_name(operation: Any, named: str) -> None:
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(UnsupportedModelError, match=f"computes its attention with {named}"):
        operation(query, Keys(query, False, _never))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    seen, new = torch.tensor([0, 255, 8_000, 65_500]), 36
    query, key = torch.zeros(4, 6, new, 8, dtype=dtype), torch.zeros(4, 3, new, 8, dtype=dtype)
    given = Tokens(query, key, key, 0.25, 0.0)
    tokens = with_positions(given, [2.0**-i for i in range(6)], seen, None)
    assert tokens.key_bHQD.shape[-1] == 8 + CHANNELS
    score = tokens.query_bNQD.double() @ tokens.key_bHQD.double()[:, [0, 0, 1, 1, 2, 2]].mT * 0.25
    position = seen[:, None] + torch.arange(new)
    for head in range(6):
        expected = (2.0**-head * position)[:, None].expand(-1, new, -1)
        assert torch.equal(score[:, head], expected.double())
