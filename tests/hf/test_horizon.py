"""The number of tokens to expect of a call is the number that transformers decodes."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from transformers import GenerationConfig

import kvpress
from kvpress.hf.horizon import expected_new_tokens, prompt_length

IDS = helpers.prompt(1, 7)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "nothing": ((IDS,), {}),
    "new tokens": ((IDS,), {"max_new_tokens": 3}),
    "length": ((IDS,), {"max_length": 12}),
    "both": ((IDS,), {"max_new_tokens": 3, "max_length": 12}),
    "by name": ((), {"input_ids": IDS, "max_length": 12}),
    "inputs": ((), {"inputs": IDS, "max_length": 12}),
    "embeddings": ((), {"inputs_embeds": torch.ones(1, 5, 96), "max_length": 12}),
    "embeddings, new": ((), {"inputs_embeds": torch.ones(1, 5, 96), "max_new_tokens": 4}),
    "ids and embeddings": (
        (IDS[:, :5],),
        {"inputs_embeds": torch.ones(1, 5, 96), "max_length": 12},
    ),
    "config": ((IDS,), {"generation_config": GenerationConfig(max_new_tokens=4)}),
    "positional config": ((IDS, GenerationConfig(max_new_tokens=4)), {}),
    "positional length": ((IDS, GenerationConfig(max_length=11)), {}),
    "beams": ((IDS,), {"max_length": 12, "num_beams": 2}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("defaults", [{}, {"max_new_tokens": 6}, {"max_length": 14}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_expected_tokens_are_those_that_transformers_decodes(
    call: str, defaults: dict[str, int]
) -> None:
    args, kwargs = CALLS[call]
    model = helpers.tiny()
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    expected = expected_new_tokens(
        args, kwargs, model.generation_config, prompt_length(args, kwargs)
    )
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    out = model.generate(*args, **kwargs, eos_token_id=None, do_sample=False)
    assert expected == out.shape[1] - (0 if ids is None else ids.shape[1])


@pytest.mark.parametrize("call", ["length", "positional config", "positional length", "inputs"])
def test_a_schedule_ends_with_the_last_token_of_the_call(call: str) -> None:
    args, kwargs = CALLS[call]
    with kvpress.attach(helpers.tiny(), "keyformer:budget=0.5") as engine:
        out = engine.generate(*args, **kwargs, do_sample=False)
        assert engine.cache.states[0].context.horizon == out.shape[1] - IDS.shape[1]
        assert not any("horizon" in note for note in engine.report().notes)
