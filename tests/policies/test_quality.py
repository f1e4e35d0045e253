"""On the real model: methods that look at attention keep what a question needs; chance does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpress.bench.common.text import default_text

import kvpress

KEY = "73916"
NEEDLE = f" The pass key is {KEY}. Remember it. {KEY} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is "


@pytest.fixture(scope="module")
def haystack(demo: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """About 1,200 tokens of text with a pass key in them and a question at the end; the key."""
    _, tokenizer = demo
    words = tokenizer(default_text().content[:20000])["input_ids"]
    parts = [words[:500], tokenizer(NEEDLE)["input_ids"], words[500:1150]]
    ids = [token for part in parts for token in part] + tokenizer(QUESTION)["input_ids"]
    return torch.tensor([ids]), torch.tensor([tokenizer(KEY)["input_ids"]])


def loss(model: Any, recipe: str, ids: torch.Tensor, key: torch.Tensor) -> float:
    """Mean negative log likelihood of the key after the prompt, fed token by token."""
    with kvpress.attach(model, recipe) as engine, torch.inference_mode():
        cache = engine.new_cache(max_new_tokens=key.shape[1])
        logits = [model(ids, past_key_values=cache, logits_to_keep=1).logits]
        for token in key[:, :-1].split(1, dim=1):
            logits.append(model(token, past_key_values=cache).logits)
    return float(torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0], key[0]))


@pytest.mark.real_model
def test_the_pass_key_survives_where_attention_is_looked_at(
    demo: tuple[Any, Any], haystack: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, _ = demo
    looks = ("keyformer:budget=0.5", "h2o:budget=0.5", "tova:budget=0.5", "snapkv:budget=0.2")
    forgets = ("streaming_llm:budget=0.5", "random:budget=0.2")
    losses = {recipe: loss(model, recipe, *haystack) for recipe in ("full", *looks, *forgets)}
    print({name: round(value, 3) for name, value in losses.items()})
    assert losses["full"] < 0.3
    assert all(losses[recipe] < 0.9 for recipe in looks)
    assert all(losses[recipe] > 1.5 for recipe in forgets)
