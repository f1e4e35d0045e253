"""Tokens that the caller protects stay, whatever the policy thinks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import BudgetError, CacheError, InputError

TOKENS, NEW = 60, 12
POLICIES = [
    "h2o:budget=0.3,recent=2",
    "snapkv:budget=0.3,window=4",
    "tova:budget=0.3",
    "random:budget=0.3,interval=3",
    "h2o:budget=0.4,recent=2+quant:residual=4",
    "h2o:budget=0.4,recent=2+adakv:scope=model",
    "kvzip:budget=0.4,instruction=,further=",
]


def kept(cache: Any, sequence: int = 0) -> list[set[int]]:
    return [set(row) for heads in helpers.positions(cache, sequence) for row in heads]


@pytest.mark.parametrize("protect", [9, [(0, 5), (20, 27)], [(31, 34)]])
@pytest.mark.parametrize("policy", POLICIES)
def test_protected_tokens_stay_and_the_count_is_that_of_the_budget(
    policy: str, protect: Any
) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, policy) as engine:
        plain, cache = engine.new_cache(), engine.new_cache(protect=protect)
        for x in (plain, cache):
            helpers.greedy(model, ids, torch.ones_like(ids), NEW, x)
        assert cache.check_integrity()
    ranges = [(0, protect)] if isinstance(protect, int) else protect
    wanted = {p for first, last in ranges for p in range(first, last)}
    for b in range(2):
        assert all(wanted <= row for row in kept(cache, b))
        assert sum(map(len, kept(cache, b))) == sum(map(len, kept(plain, b)))
    assert protect == 9 or not all(wanted <= row for row in kept(plain))


@pytest.mark.parametrize("policy", POLICIES)
def test_each_sequence_has_its_own_alone_and_in_a_batch(policy: str) -> None:
    model, lengths = helpers.sharp("llama"), [40, 25, 40]
    ids, mask = helpers.padded(lengths, "left")
    spans: list[Any] = [[(0, 6)], [(3, 5), (8, 11)], [(20, 29)]]
    with kvpress.attach(model, policy) as engine:
        cache = engine.new_cache(protect=spans)
        together = helpers.greedy(model, ids, mask, NEW, cache)
        for b in range(3):
            own = ids[b : b + 1][mask[b : b + 1].bool()][None]
            alone = engine.new_cache(protect=[spans[b]])
            tokens = helpers.greedy(model, own, torch.ones_like(own), NEW, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


def test_forks_files_and_reordered_batches_protect_on(tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, "h2o:budget=20") as engine, torch.no_grad():
        cache = engine.new_cache(protect=[[(4, 9)], [(0, 3), (12, 14)]])
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        turned = cache.fork()
        turned.reorder_cache(torch.tensor([1, 0]))
        for other in (cache.fork(), engine.load_cache(tmp_path / "cache.safetensors"), turned):
            for step in range(30):
                model(ids[:, step : step + 1], past_key_values=other)
            order = [1, 0] if other is turned else [0, 1]
            for b, source in enumerate(order):
                span = [{4, 5, 6, 7, 8}, {0, 1, 2, 12, 13}][source]
                assert all(span <= row and len(row) == 20 for row in kept(other, b))
        model(ids, past_key_values=cache)  # a second turn
        assert all({4, 5, 6, 7, 8} <= row for row in kept(cache))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_what_is_protected_twice_after_a_prompt_stays(family: str, scope: str, seed: int) -> None:
    model, ids = helpers.sharp(family), helpers.prompt(1, 23, seed)
    with kvpress.attach(model, f"h2o:budget=0.4prompt+adakv:scope={scope}") as engine:
        cache = engine.new_cache(protect=[(5, 9), (20, 22)])
        helpers.greedy(model, ids, torch.ones_like(ids), 12, cache)
        assert all({5, 6, 7, 8, 20, 21} <= row for row in kept(cache))


def test_generate_takes_them_too() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, "streaming_llm:budget=12,sink=0") as engine:
        engine.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2, protect=[(10, 15)])
        assert all({10, 11, 12, 13, 14} <= row for b in range(2) for row in kept(engine.cache, b))


@pytest.mark.parametrize(
    "given", [0, -3, "system", [(5, 2)], [(1, 2, 3)], [3.5, "a"], (0, 5), True]
)
def test_what_is_no_range_is_refused(given: Any) -> None:
    with (
        kvpress.attach(helpers.tiny(), "h2o") as engine,
        pytest.raises(CacheError, match="protect="),
    ):
        engine.new_cache(protect=given)


@torch.no_grad()
def test_what_cannot_be_protected_is_refused_before_anything_changes() -> None:
    model, ids = helpers.tiny(), helpers.prompt(3, 20)
    with kvpress.attach(model, "h2o:budget=10") as engine:
        cache = engine.new_cache(protect=[[(0, 2)], [(0, 3)]])
        with pytest.raises(CacheError, match=r"2 sequences, but the batch has 3"):
            model(ids, past_key_values=cache)
        cache = engine.new_cache(protect=[(0, 11)])
        with pytest.raises(BudgetError, match="protected"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="before the first tokens"):
            engine.generate(ids, cache=cache, protect=3)
    with kvpress.attach(model, "h2o:budget=0.2") as engine:
        cache = engine.new_cache(protect=[(0, 11)])
        model(ids, past_key_values=cache)
        assert any("below the protected tokens" in note for note in cache.report().notes)


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_roles_are_found_by_rendering_with_and_without_them() -> None:
    tokenizer = helpers.characters()
    tokenizer.chat_template = TEMPLATE
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "be brief"},
        {"role": "system", "content": "no, be long"},
        {"role": "user", "content": "why"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    spans = kvpress.spans_of(tokenizer, chat)
    found = [text[first:last] for first, last in spans]
    assert found[0] == "<system>be brief</>" and "no, be long" in found[1]
    assert len(found[1]) == len("<system>no, be long</>")
    tokenizer.chat_template = (  # with a message of its own where there is none
        "{% if messages[0]['role'] != 'system' %}<system>You are a helpful assistant.</>{% endif %}"
        + TEMPLATE
    )
    chat = [
        {"role": "system", "content": "You are a very helpful, and thorough assistant."},
        {"role": "user", "content": "why"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ((first, last),) = kvpress.spans_of(tokenizer, chat)
    assert text[first:last].startswith("<system>" + chat[0]["content"])
    with pytest.raises(InputError, match="'tool'"):
        kvpress.spans_of(tokenizer, chat, role="tool")
