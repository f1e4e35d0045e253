"""A cache may be filled in one mode of autograd and continued in any other."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
RECIPES = [
    *helpers.recipes().values(),
    "sale:threshold=0.01,least=16",
    "d2o:budget=0.4,count_bias=true,merge_keys=unrotated",
    "quant:residual=4,guard=0.1",
    "think:recent=4,window=8",
    "keyformer:budget=0.5+think:recent=4,window=8+quant:residual=4",
    "streaming_llm:budget=30+quant:residual=4",
]


class Texts:
    """Two texts that go on step by step.

    feeding, changing: the modes of forward passes and of everything else that is done to a cache.
    """

    def __init__(self, engine: kvpress.Engine, feeding: list[str], changing: list[str]) -> None:
        self.engine = engine
        self.feeding, self.changing = itertools.cycle(feeding), itertools.cycle(changing)
        self.ids, self.fed = helpers.prompt(2, 400), 0
        self.cache = engine.new_cache(max_new_tokens=20)
        self.logits: list[torch.Tensor] = []

    def feed(self, tokens: int) -> None:
        new = self.ids[:, self.fed : self.fed + tokens]
        with MODES[next(self.feeding)]():
            out = self.engine.model(new, past_key_values=self.cache)
        self.fed += tokens
        self.logits.append(out.logits.detach().clone())
        self.check(self.cache)

    def do(self, change: Callable[[Any], Any]) -> Any:
        with MODES[next(self.changing)]():
            given = change(self.cache)
        self.check(self.cache)
        self.check(given)
        return given

    def check(self, cache: Any) -> None:
        """What layers keep may be written to in any mode, whichever operators would dare to."""
        states = getattr(cache, "states", None)
        assert not any(tensor.is_inference() for tensor in helpers.live_tensors(states))

    def decode(self, tokens: int = 3) -> None:
        for _ in range(tokens):
            self.feed(1)


def tell(
    engine: kvpress.Engine, feeding: list[str], changing: list[str], path: Path
) -> list[torch.Tensor]:
    """The logits of a text that takes every path."""
    text = Texts(engine, feeding, changing)
    text.feed(70)
    text.decode()
    text.feed(90)
    text.decode()
    text.do(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    text.decode()
    other = text.do(lambda cache: cache.fork())
    text.decode()
    text.cache = other
    text.decode()
    text.do(lambda cache: cache.unshare())
    text.decode()
    text.do(lambda cache: cache.activate_past_recording())
    text.feed(4)
    text.do(lambda cache: cache.crop(-2))
    text.decode()
    text.feed(5)
    text.do(lambda cache: cache.stop_past_recording())
    text.decode()
    text.cache = text.do(copy.deepcopy)
    text.decode()
    text.do(lambda cache: cache.save(path))
    text.cache = text.do(lambda _: engine.load_cache(path))
    text.decode(6)
    text.do(lambda cache: cache.report())
    text.do(lambda cache: cache.reset())
    text.feed(70)
    text.decode()
    return text.logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_modes_of_calls_change_nothing(recipe: str, tmp_path: Path) -> None:
    model = helpers.tiny("llama").requires_grad_(False)
    with kvpress.attach(model, recipe) as engine:
        wanted = tell(engine, ["no_grad"], ["no_grad"], tmp_path / "cache")
        one, other, mixed = ["inference"], ["no_grad"], ["inference", "no_grad", "grad"]
        for modes in ((one, one), (one, other), (other, one), (mixed, one), (mixed, other)):
            given = tell(engine, *modes, tmp_path / "cache")
            for x, y in zip(given, wanted, strict=True):
                assert torch.equal(x, y), modes


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "sale" not in recipe])
def test_prompts_of_a_model_that_trains(recipe: str, tmp_path: Path) -> None:
    """Their attention is computed by other operators: rounding may differ. Sparse ones are not."""
    model = helpers.tiny("llama")
    with kvpress.attach(model, recipe) as engine:
        wanted = tell(engine, ["no_grad"], ["no_grad"], tmp_path / "cache")
        for modes in (["grad"], ["grad", "inference"], ["inference", "grad", "grad"]):
            given = tell(engine, modes, ["grad"], tmp_path / "cache")
            for one, other in zip(given, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["h2o:budget=0.5", "keyformer:budget=0.5+quant:residual=4"])
def test_batches_with_padding_and_beams(recipe: str) -> None:
    """Rows that go alone, and beams that share pages."""
    model, (ids, mask) = helpers.tiny("llama"), helpers.padded([50, 30], "left")

    def call(mode: str, then: str) -> torch.Tensor:
        with kvpress.attach(model, recipe) as engine:
            cache = engine.new_cache(max_new_tokens=8)
            with MODES[mode]():
                model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
            with MODES[then]():
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=8,
                    do_sample=False,
                )
            with MODES[mode]():
                beams = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3)
            return torch.cat([out, beams], 0).clone()

    wanted = call("no_grad", "no_grad")
    for mode, then in itertools.permutations(MODES, 2):
        assert torch.equal(call(mode, then), wanted), (mode, then)


def test_gradients_of_a_prompt_are_those_of_transformers() -> None:
    """A model in training mode passes through; what was cached before gets no gradient."""
    model, ids = helpers.tiny("llama").train(), helpers.prompt(2, 40)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    with kvpress.attach(model, "full") as engine:
        for one, other in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(one, other)
        cache = engine.new_cache()
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        loss = model(ids, labels=ids, past_key_values=cache).loss
        loss.backward()
        model(ids[:, :1], past_key_values=cache)
        assert cache.states[0].store.paging.pages("key").requires_grad is False
    assert all(p.grad is not None for p in model.parameters())
