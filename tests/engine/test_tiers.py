"""Where pages are decides nothing: the same bits on the device, on the host and on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import torch
from torch import Tensor

import kvpress

TOKENS = 560
STYLES = {"at once": [560], "chunks": [230, 37, 200, 93], "turns": [340, 220]}
RECIPES = [
    "full",
    "snapkv:budget=0.5",
    "quant",
    "keyformer:budget=0.5+quant",
    "h2o:budget=0.4",
    "random:budget=0.5",
    "snapkv:budget=0.5+adakv",
    "think",
    "think+quant",
    "quest:dense=0,read=160",
    "leoam:read=0.3",
    "freekv:dense=0,read=160",
    "keyformer:budget=0.6+leoam+quant",
]
SHAPES = [
    (4, 4, 32, torch.float32),
    (4, 2, 64, torch.float32),
    (4, 1, 32, torch.float32),
    (4, 4, 32, torch.bfloat16),
    (4, 2, 64, torch.bfloat16),
    (4, 1, 64, torch.bfloat16),
]


def run(engine: Any, style: str) -> list[Tensor]:
    """Logits of a prompt, or of turns of a chat, and of what is decoded behind them."""
    cache, ids = engine.new_cache(max_new_tokens=8), helpers.prompt(1, TOKENS)
    if style == "turns":
        found = []
        for part in ids.split(STYLES[style], dim=1):
            found += tiered.feed(engine.model, cache, part, [part.shape[1]])
            found += tiered.decode(engine.model, cache, found[-1], 4)
    else:
        found = tiered.feed(engine.model, cache, ids, STYLES[style])
        found += tiered.decode(engine.model, cache, found[-1], 6)
    tiered.check(engine, cache)
    engine.below = tiered.below(cache) if engine.spec.tiers else 0
    return found


def same(given: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_the_same_wherever_pages_are(recipe: str, style: str, tmp_path: Path) -> None:
    model = tiered.model()
    with kvpress.attach(model, recipe) as engine:
        without = run(engine, style)
    with tiered.attached(model, recipe, tiered.ALL) as engine:
        expected = run(engine, style)
        assert not engine.below
    assert tiered.tokens(expected) == tiered.tokens(without)
    number = RECIPES.index(recipe) + list(STYLES).index(style)
    for way in tiered.LOWER if recipe == "full" else [tiered.LOWER[number % 3]]:
        with tiered.attached(model, recipe, tiered.caps(way, model, recipe, 1, tmp_path)) as engine:
            given = run(engine, style)
            if recipe in ("full", "think"):  # others hold too little for every device
                assert engine.below
        assert same(given, expected), way


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", ["full", "snapkv:budget=0.7+quant"])
def test_whatever_the_heads_and_the_dtype(recipe: str, shape: Any, tmp_path: Path) -> None:
    model = tiered.model(*shape)
    with tiered.attached(model, recipe, tiered.ALL) as engine:
        expected = run(engine, "chunks")
    with tiered.attached(model, recipe, tiered.caps("both", model, recipe, 1, tmp_path)) as engine:
        assert same(run(engine, "chunks"), expected)
        assert engine.below or recipe != "full"


@pytest.mark.real_model
@pytest.mark.parametrize("recipe", RECIPES[:4])
def test_the_real_model_gives_the_same_logits(
    recipe: str, demo: tuple[Any, Any], tmp_path: Path
) -> None:
    from kvpress.bench.common.prompt import reference_prompt

    model, tokenizer = demo
    first, rest = (200, 500) if "keyformer" in recipe else (200, 250)  # what drops needs more
    text = reference_prompt(tokenizer, first + rest + 20)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : first + rest]
    device, opened = tiered.least(model, recipe)
    small = {"device": device, "host": opened, "disk": f"256MiB:{tmp_path}"}
    runs = []
    for caps in ({"device": "1GiB"}, small):
        with tiered.attached(model, recipe, caps) as engine:
            cache = engine.new_cache(max_new_tokens=8)
            found = tiered.feed(model, cache, ids, [first, rest])
            runs.append(found + tiered.decode(model, cache, found[-1], 4))
            tiered.check(engine, cache)
            assert bool(tiered.below(cache)) == ("host" in caps)
    assert same(*runs)


@pytest.mark.parametrize("style", STYLES)
def test_full_gives_the_tokens_of_the_model_itself(style: str) -> None:
    model, ids = tiered.model(), helpers.prompt(2, TOKENS, seed=3)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    caps = tiered.caps("host", model, "full", 2, Path())
    with tiered.attached(model, "full", caps) as engine:
        cache = engine.new_cache()
        if style != "at once":
            tiered.feed(model, cache, ids[:, : STYLES[style][0]], [STYLES[style][0]])
        out = engine.generate(ids, cache=cache, max_new_tokens=20, do_sample=False)
        assert tiered.below(cache)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.5+quant"])
@pytest.mark.parametrize("copies", ["LateCopies", "ShuffledCopies"])
def test_late_copies_change_nothing(
    recipe: str, copies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiered.model()
    with tiered.attached(model, recipe, tiered.ALL) as engine:
        expected = run(engine, "chunks")
    monkeypatch.setattr("kvpress.store.tiers.tiers.copies", getattr(tiered, copies))
    for way in ("host", "both"):
        with tiered.attached(model, recipe, tiered.caps(way, model, recipe, 1, tmp_path)) as engine:
            assert type(engine.spec.tiers.engine).__name__ == copies
            assert same(run(engine, "chunks"), expected), way


@pytest.mark.parametrize("recipe", ["full", "quant"])
def test_threads_of_torch_change_nothing_that_they_do_not_change_anyway(
    recipe: str, tmp_path: Path
) -> None:
    model, runs, plain = tiered.model(), {}, {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with kvpress.attach(model, recipe) as engine:
                plain[threads] = run(engine, "at once")
            for way in ("all", "both"):
                caps = tiered.caps(way, model, recipe, 1, tmp_path)
                with tiered.attached(model, recipe, caps) as engine:
                    runs[threads, way] = run(engine, "at once")
    finally:
        torch.set_num_threads(before)
    for threads in (1, 2):
        assert same(runs[threads, "both"], runs[threads, "all"]), threads
    if same(plain[1], plain[2]):
        assert same(runs[2, "both"], runs[1, "both"])


def test_any_device_between_the_smallest_and_everything(tmp_path: Path) -> None:
    model, expected = tiered.model(), None
    device, opened = tiered.least(model, "full")
    for size in (1 << 26, device, device + 1, device + opened // 2, device + 3 * opened + 77):
        with tiered.attached(model, "full", {"device": size, "host": "16MiB"}) as engine:
            given = run(engine, "turns")
        expected = expected or given
        assert same(given, expected), size


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2-mixed"])
def test_layers_with_a_window_keep_it_on_the_device(family: str, tmp_path: Path) -> None:
    model = helpers.sharp(family)
    ids = helpers.prompt(1, TOKENS)
    runs = []
    for way in ("all", "both"):
        with tiered.attached(model, "full", tiered.caps(way, model, "full", 1, tmp_path)) as engine:
            cache = engine.new_cache()
            found = tiered.feed(model, cache, ids, [400, 160])
            runs.append(found + tiered.decode(model, cache, found[-1], 5))
            streams = [state.store.streams for state in cache.states]
            assert streams == [kind.window is None for kind in cache.fingerprint.kinds]
    assert same(*runs)
    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        plain = tiered.feed(model, cache, ids, [400, 160])
        plain += tiered.decode(model, cache, plain[-1], 5)
    assert tiered.tokens(plain) == tiered.tokens(runs[1])
