"""`full` gives transformers' own tokens and logits, in every family and with padding."""

from __future__ import annotations

import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import ops
from kvpress.errors import PolicyError
from kvpress.store.paging import Paging


@pytest.mark.parametrize("family", list(helpers.FAMILIES))
def test_greedy_generate_equals_transformers(family: str) -> None:
    model, ids = helpers.tiny(family), helpers.prompt(2, 37)
    arguments = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **arguments)
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(engine.generate(ids, **arguments), expected)
        assert torch.equal(model.generate(ids, **arguments), expected)
        cache = engine.new_cache()
        assert torch.equal(
            model.generate(ids, past_key_values=cache, use_cache=True, **arguments), expected
        )
        assert cache.check_integrity()


@pytest.mark.parametrize("family", list(helpers.FAMILIES))
def test_logits_equal_transformers_within_rounding(family: str) -> None:
    model, ids = helpers.tiny(family), helpers.prompt(1, 40)
    chunks = ids.split([30, 1, 1, 8], 1)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        expected = [model(chunk, past_key_values=cache).logits for chunk in chunks]
        with kvpress.attach(model, "full") as engine:
            ours = engine.new_cache()
            given = [model(chunk, past_key_values=ours).logits for chunk in chunks]
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_group_size(group: int) -> None:
    model, ids = helpers.tiny(query_heads=2 * group, kv_heads=2), helpers.prompt(2, 33)
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    with kvpress.attach(model, "full"):
        assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gemma3"])
def test_row_in_a_padded_batch_equals_the_row_alone(family: str, side: str) -> None:
    model, lengths = helpers.tiny(family), [29, 1, 13, 22]
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, "full") as engine:
        together = helpers.greedy(model, ids, mask, 16, engine.new_cache())
    for row in range(len(lengths)):
        alone = ids[row : row + 1][:, mask[row].bool()]
        cache = DynamicCache(config=model.config)
        expected = helpers.greedy(model, alone, torch.ones_like(alone), 16, cache)
        assert torch.equal(together[row : row + 1], expected), f"row {row}"


def test_left_padded_generate_equals_transformers() -> None:
    model = helpers.tiny()
    ids, mask = helpers.padded([29, 7, 13, 22], "left")
    arguments = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **arguments)
    with kvpress.attach(model, "full"):
        assert torch.equal(model.generate(ids, **arguments), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
def test_forward_without_a_cache_equals_transformers(family: str) -> None:
    model = helpers.tiny(family)
    ids, mask = helpers.padded([29, 7], "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        with kvpress.attach(model, "full"):
            given = model(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(given[real], expected[real], rtol=1e-4, atol=2e-5)


def test_second_turn_feeds_only_the_new_tokens() -> None:
    model, first, second = helpers.tiny(), helpers.prompt(1, 20), helpers.prompt(1, 9, seed=5)
    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        answer = engine.generate(first, past_key_values=cache, max_new_tokens=6, do_sample=False)
        chat = torch.cat([answer, second], dim=1)
        given = engine.generate(chat, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(given, model.generate(chat, max_new_tokens=6, do_sample=False))


def test_beams_samples_and_repeated_sequences_equal_transformers() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 21)
    for arguments in (
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        {"prompt_lookup_num_tokens": 3, "do_sample": False, "eos_token_id": 96},
    ):
        batch = ids[:1] if "prompt_lookup_num_tokens" in arguments else ids
        torch.manual_seed(3)
        expected = model.generate(batch, max_new_tokens=12, **arguments)
        with kvpress.attach(model, "full"):
            torch.manual_seed(3)
            assert torch.equal(model.generate(batch, max_new_tokens=12, **arguments), expected)


@pytest.mark.real_model
def test_real_model_gives_the_same_128_tokens_after_2000(demo: tuple) -> None:
    from kvpress.bench.common.prompt import reference_prompt

    model, tokenizer = demo
    ids = tokenizer(reference_prompt(tokenizer, 2000), return_tensors="pt")["input_ids"]
    arguments = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **arguments)
    with kvpress.attach(model, "full") as engine:
        given = engine.generate(ids, attention_mask=mask, **arguments)
    assert given.shape[1] - ids.shape[1] == 128
    assert torch.equal(given, expected)


def test_half_precision_storage_halves_the_cache_and_keeps_the_text() -> None:
    model = helpers.tiny("llama")
    ids = helpers.prompt(2, 40)
    with kvpress.attach(model, "full") as engine:
        engine.generate(ids, max_new_tokens=4)
        plain = engine.report()
    with kvpress.attach(model, "full", cache_dtype=torch.bfloat16) as engine:
        out = engine.generate(ids, max_new_tokens=4)
        half = engine.report()
    assert out.shape == (2, 44)
    assert half.bytes_full == plain.bytes_full
    slots = sum(n for layer in half.slots_kept for rows in layer for n in rows)
    saved = plain.bytes_held - half.bytes_held
    assert saved >= slots * 2 * 16 * 2  # two bytes less for every channel of keys and values
    with pytest.raises(PolicyError, match="cache_dtype"):
        kvpress.attach(model, "full", cache_dtype=torch.int8)


@pytest.mark.parametrize("policy", ["full", "snapkv", "h2o", "keyformer", "streaming_llm"])
def test_a_decode_step_is_one_operator_call_per_layer(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("decode_step", "decode_rows", "gather_slots", "scatter_slots"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    model = helpers.tiny("llama")
    with kvpress.attach(model, policy) as engine, torch.inference_mode():
        cache = engine.new_cache(8)
        model(helpers.prompt(2, 90), past_key_values=cache)
        for _ in range(3):
            calls.clear()
            model(helpers.prompt(2, 1), past_key_values=cache)
            assert calls == ["decode_step"] * len(cache.states)


@pytest.mark.parametrize(
    ("policy", "operator"),
    [("h2o", "attend_sums"), ("keyformer", "attend_sums"), ("snapkv:window=32", "attention_sums")],
)
def test_a_prompt_is_scored_by_one_operator_call_per_layer(
    policy: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every query scores, the call gives the attention output too."""
    if operator == "attend_sums" and ops.backends()["cpu"] != "cpu":
        pytest.skip("the references score beside PyTorch's attention")
    calls: list[str] = []
    for name in ("attend_sums", "attention_sums"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, real=real, name=name: calls.append(name) or real(*a)
        )
    dense = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "kvpress.formulas.attention.F.scaled_dot_product_attention",
        lambda *a, **k: calls.append("dense") or dense(*a, **k),
    )
    model = helpers.tiny("llama")
    with kvpress.attach(model, policy) as engine, torch.inference_mode():
        cache = engine.new_cache(8)
        model(helpers.prompt(2, 90), past_key_values=cache)
        alone = operator == "attend_sums"
        assert calls == ([operator] if alone else ["dense", operator]) * len(cache.states)


@pytest.mark.parametrize("budget", [31, 32, 33])
def test_rows_at_their_quotas_ask_the_store_for_nothing(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step brings one token and evicts one, wherever the last page ends."""
    asked: list[int] = []
    reserve = Paging.reserve
    monkeypatch.setattr(
        Paging, "reserve", lambda self, counts: asked.append(1) or reserve(self, counts)
    )
    model = helpers.tiny("llama")
    with kvpress.attach(model, f"h2o:budget={budget}") as engine, torch.inference_mode():
        cache = engine.new_cache(40)
        model(helpers.prompt(2, 90), past_key_values=cache)
        for _ in range(40):
            model(helpers.prompt(2, 1), past_key_values=cache)
        assert len(asked) <= len(cache.states)  # once each, for the first token beyond the quota
        assert cache.check_integrity()
        kept = cache.report().slots_kept
        assert {n for layer in kept for rows in layer for n in rows} == {budget}


def test_training_through_an_attached_model_keeps_its_gradients() -> None:
    """One pass for attention and scores has no gradient, so that it is not taken here."""
    model, ids = helpers.tiny("llama"), helpers.prompt(1, 20)
    gradients = []
    for recipe in ("full", "keyformer"):
        model.zero_grad()
        with kvpress.attach(model, recipe):
            model(ids).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
