"""Prompts in chunks: each is compressed as it comes; the peak is the budget and one chunk."""

from __future__ import annotations

import weakref

import helpers
import pytest
import torch

import kvpress
from kvpress.store.tiers.device import PagePool


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The largest number of bytes that the pools of all stores held at once."""
    made: list[weakref.ref[torch.Tensor]] = []
    highest, new = [0], PagePool._new

    def counted(pool: PagePool, name: str, pages: int) -> torch.Tensor:
        tensor = new(pool, name, pages)
        made.append(weakref.ref(tensor))
        alive = (reference() for reference in made)
        highest[0] = max(highest[0], sum(t.nbytes for t in alive if t is not None))
        return tensor

    monkeypatch.setattr(PagePool, "_new", counted)
    return highest


@pytest.mark.parametrize("recipe", ["snapkv", "streaming_llm", "keyformer"])
def test_the_peak_of_a_long_prompt_is_the_budget_and_one_chunk(
    recipe: str, peak: list[int]
) -> None:
    model = helpers.tiny(num_hidden_layers=2, head_dim=64, max_position_embeddings=8192)
    ids, chunk = helpers.prompt(1, 8000), 512
    with kvpress.attach(model, f"{recipe}:budget=0.1") as engine:
        engine.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
        report = engine.report()
    full = 8000 * 2 * 2 * 2 * 64 * 4  # tokens, layers, KV heads, keys and values, width, bytes
    slots = {n for layer in report.slots_kept for row in layer for n in row}
    assert slots == {801 if recipe == "snapkv" else 800}  # snapkv keeps the decoded token as well
    assert 0.1 * full <= peak[0] <= 1.05 * (0.1 * full + full * chunk / 8000)


@pytest.mark.parametrize("recipe", ["full", "snapkv:budget=0.5", "h2o:budget=0.4"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_chunks_are_what_separate_forward_passes_are(recipe: str, chunk: int) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 64)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        out = engine.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
        alone = engine.new_cache(max_new_tokens=1)
        for part in ids.split(chunk, dim=1):
            logits = model(part, past_key_values=alone).logits
        assert int(out[0, -1]) == int(logits[0, -1].argmax())
        assert helpers.positions(engine.cache) == helpers.positions(alone)
