"""A compiled model gives the same tokens with an engine attached, whichever came first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.errors import MaskError

NEW = 8
# What dynamo says of transformers and of Python itself, whatever is compiled.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Compiled code is kept per process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sharp(family: str, **fields: Any) -> Any:
    """A random model whose next token depends on what it attends to."""
    return helpers.tiny(family, initializer_range=0.3, tie_word_embeddings=False, **fields)


def whole(model: Any, **options: Any) -> Any:
    return torch.compile(model, **options)


def method(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


def forward(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **options)
    return model


def decode(model: Any, engine: Any, side: str = "left") -> torch.Tensor:
    ids, mask = helpers.padded([19, 11], side)
    return helpers.greedy(model, ids, mask, NEW, engine.new_cache(max_new_tokens=NEW))


@pytest.mark.parametrize("way", [method, forward])
def test_prompt_and_steps_give_the_tokens_of_the_model_as_it_is(way: Callable[..., Any]) -> None:
    model = sharp("llama", num_hidden_layers=1)
    with kvpress.attach(model, "keyformer:budget=0.5") as engine:
        expected = decode(model, engine)
        assert torch.equal(decode(way(model, backend="eager"), engine), expected)


def test_sliding_layers_and_a_backend_that_traces_operators_give_the_same() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = sharp("gemma3", num_hidden_layers=2, layer_types=kinds)
    with kvpress.attach(model, "snapkv:budget=0.5,window=4") as engine:
        expected = decode(model, engine, "right")
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(decode(compiled, engine, "right"), expected)


@torch.no_grad()
def test_engines_come_and_go_on_a_compiled_model() -> None:
    model, ids = sharp("llama", num_hidden_layers=2), helpers.prompt(2, 19)
    compiled = torch.compile(model, backend="eager")
    before = compiled(ids)
    for recipe in ("full", "keyformer:budget=0.5"):
        with kvpress.attach(model, recipe) as engine:
            expected = decode(model, engine)
            kept = helpers.positions(engine.cache)
            assert torch.equal(decode(compiled, engine), expected)
            assert helpers.positions(engine.cache) == kept
            assert engine.cache.check_integrity()
            out = compiled(ids)
            assert out.past_key_values is engine.cache
            torch.testing.assert_close(out.logits, before.logits, rtol=1e-4, atol=2e-5)
            out = compiled(ids, use_cache=False)
            assert out.past_key_values is None
            torch.testing.assert_close(out.logits, before.logits, rtol=1e-4, atol=2e-5)
        after = compiled(ids)
        assert isinstance(after.past_key_values, DynamicCache)
        assert torch.equal(after.logits, before.logits)


@torch.no_grad()
def test_the_graphs_are_compiled_once_however_long_the_cache_grows() -> None:
    model, ids = sharp("llama", num_hidden_layers=2), helpers.prompt(2, 19)
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counted)
    with kvpress.attach(model, "keyformer:budget=0.5"):
        cache = compiled(ids).past_key_values
        for _ in range(4):
            compiled(ids[:, :1], past_key_values=cache)
        graphs = counted.frame_count
        assert graphs > 2
        for _ in range(8):
            compiled(ids[:, :1], past_key_values=cache)
        assert counted.frame_count == graphs
        assert cache.get_seq_length() == 19 + 12


@pytest.mark.parametrize("way", [whole, method, forward])
def test_a_single_graph_is_refused_with_the_reason(way: Callable[..., Any]) -> None:
    model = way(sharp("llama"), backend="eager", fullgraph=True)
    inner = getattr(model, "_orig_mod", model)
    with (
        kvpress.attach(inner, "full"),
        pytest.raises(RuntimeError, match=r"kvpress: a compressed.*Compile without fullgraph=True"),
    ):
        model(helpers.prompt(1, 19))


@torch.no_grad()
def test_errors_of_the_engine_come_through() -> None:
    model, ids = sharp("llama"), helpers.prompt(1, 19)
    compiled = torch.compile(model, backend="eager")
    with kvpress.attach(model, "full"), pytest.raises(MaskError, match=r"need \(1, 19\)"):
        compiled(ids, attention_mask=torch.ones(1, 18))
