"""Every sequence of a batch is treated as if it were alone, whatever the others do."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress

RECIPES = [
    "full",
    "h2o:budget=0.5",
    "h2o:budget=20KiB,interval=2",
    "keyformer:budget=9,noise=none,interval=3",
    "keyformer:budget=0.5,normalise_age=true",
    "keyformer:budget=0.4,noise=frozen,window=5,horizon=5",
    "knorm:budget=0.5,interval=4",
    "knorm:budget=12,interval=5",
    "snapkv:budget=0.5,window=4,pool=3",
    "streaming_llm:budget=0.5",
    "tova:budget=0.5,interval=0",
    "tova:budget=12,interval=5",
    "random:budget=0.5",
]

# Which of the new columns are real, for three sequences: prompts, chunks, steps, idle steps.
SCHEDULE = [
    ["11111111111111111111", "00000000001111111111", "00000000000000000000"],
    ["1", "1", "1"],
    ["1", "0", "1"],
    ["1", "1", "0"],
    ["11111", "00001", "00000"],
    ["1", "1", "1"],
    ["0", "0", "1"],
    ["110110", "011111", "111111"],
    *[["1", "1", "1"]] * 7,
    ["1", "0", "1"],
    *[["1", "1", "1"]] * 4,
]


@torch.no_grad()
def feed(model: Any, cache: Any, rows: list[list[str]], first: int) -> list[torch.Tensor]:
    """The logits of every real token of each row, feeding the schedule; ids depend on the row."""
    seen = torch.zeros(len(rows[0]), 0, dtype=torch.long)
    outputs: list[list[torch.Tensor]] = [[] for _ in rows[0]]
    for number, step in enumerate(rows):
        mask = torch.tensor([[int(c) for c in row] for row in step])
        width = mask.shape[1]
        ids = torch.zeros_like(mask)
        for r in range(len(step)):
            real = int(mask[r].sum())
            ids[r, mask[r].bool()] = helpers.prompt(1, real, seed=100 * (first + r) + number)[0]
        seen = torch.cat([seen, mask], dim=1)
        position = (seen.cumsum(1) - 1).clamp_min(0)[:, -width:]
        logits = model(
            ids, attention_mask=seen, position_ids=position, past_key_values=cache
        ).logits
        for r in range(len(step)):
            outputs[r].append(logits[r, mask[r].bool()])
    return [torch.cat(parts) for parts in outputs]


def held(cache: Any, row: int, text: list[int], ties: bool) -> list[list[list[int]]]:
    """The positions that every layer and head holds; where ranks tie, the tokens there."""
    found = helpers.positions(cache, row)
    if not ties:
        return found
    return [[sorted(text[p] for p in head) for head in layer] for layer in found]


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed"])  # no QK-norm, or all norms tie
@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_steps_in_a_batch_equal_the_sequences_alone(recipe: str, family: str) -> None:
    model = helpers.tiny(family, initializer_range=0.3)
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=9)
        together = feed(model, cache, SCHEDULE, 0)
        assert cache.check_integrity()
        for row in range(3):
            own = engine.new_cache(max_new_tokens=9)
            alone, text = [], []
            for number, step in enumerate(SCHEDULE):
                real = step[row].count("1")
                if not real:
                    continue
                ids = helpers.prompt(1, real, seed=100 * row + number)
                text += ids[0].tolist()
                with torch.no_grad():
                    alone.append(model(ids, past_key_values=own).logits[0])
            ties = recipe.startswith("knorm")  # by the first layer's norms of the same token
            atol = 2e-3 if ties else 2e-4
            torch.testing.assert_close(together[row], torch.cat(alone), rtol=2e-3, atol=atol)
            assert held(cache, row, text, ties) == held(own, 0, text, ties), f"row {row}"
