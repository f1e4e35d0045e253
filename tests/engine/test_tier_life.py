"""Caches with tiers live as other caches do: forks, beams, copies, threads, and their end."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import torch
from torch import Tensor
from transformers import pipeline

import kvpress

TOKENS = 560
ALIKE = {"rtol": 1e-3, "atol": 1e-4}  # with tiers and without


def begun(engine: Any, sequences: int = 1, seed: int = 0) -> tuple[Any, list[Tensor]]:
    """A cache that has read a prompt, and its logits."""
    cache = engine.new_cache(max_new_tokens=8)
    ids = helpers.prompt(sequences, TOKENS, seed)
    return cache, tiered.feed(engine.model, cache, ids, [400, TOKENS - 400])


def goes_on(engine: Any, cache: Any, token: int = 5, new: int = 3) -> list[Tensor]:
    """Logits of a token and of what is decoded behind it."""
    ids = torch.full((cache.batch_size, 1), token)
    found = tiered.feed(engine.model, cache, ids, [1])
    found += tiered.decode(engine.model, cache, found[-1], new)
    tiered.check(engine, cache)
    return found


def forks(engine: Any) -> list[Tensor]:
    """Three of one context, in turn, the context itself among them."""
    cache, found = begun(engine)
    others = [cache.fork(), cache.fork()]
    for turn in range(2):
        for token, one in enumerate([cache, *others]):
            ids = helpers.prompt(1, 70, seed=10 + token + turn)
            found += tiered.feed(engine.model, one, ids, [70])
    del others[0]
    return found + goes_on(engine, cache) + goes_on(engine, others[0], 7)


def copies(engine: Any) -> list[Tensor]:
    """A deep copy, and what it was made of, which ends first."""
    cache, found = begun(engine)
    other = copy.deepcopy(cache)
    found += goes_on(engine, cache, 3, 40)
    del cache
    return found + goes_on(engine, other, 9)


def beams(engine: Any) -> list[Tensor]:
    """Sequences are reordered, repeated and dropped."""
    cache, found = begun(engine, 2)
    for index in ([1, 0], [0, 0], [1, 1]):
        cache.reorder_cache(torch.tensor(index))
        found += goes_on(engine, cache, 4)
    cache.batch_select_indices(torch.tensor([1]))
    found += goes_on(engine, cache, 8)
    cache.batch_repeat_interleave(2)
    cache.unshare()
    return found + goes_on(engine, cache, 8)


def apart(engine: Any) -> list[Tensor]:
    """Two sequences that share their pages read different tokens, and drop different slots."""
    cache, found = begun(engine)
    cache.batch_repeat_interleave(2)
    kept = helpers.positions(cache)
    for token in range(30):
        ids = torch.tensor([[token], [90 - token]])
        found += tiered.feed(engine.model, cache, ids, [1])
    assert helpers.positions(cache) != kept != helpers.positions(cache, 1)
    assert helpers.positions(cache) != helpers.positions(cache, 1)
    return found + goes_on(engine, cache, 8)


def again(engine: Any) -> list[Tensor]:
    """A cache that is emptied and used again."""
    cache, found = begun(engine)
    found += goes_on(engine, cache)
    cache.reset()
    assert all(state.store is None for state in cache.states)
    found += tiered.feed(engine.model, cache, helpers.prompt(1, TOKENS, seed=4), [TOKENS])
    return found + goes_on(engine, cache)


def mixed(engine: Any) -> list[Tensor]:
    """Some passes under inference mode, others not."""
    with torch.inference_mode():
        cache, found = begun(engine)
    found += goes_on(engine, cache)
    with torch.inference_mode():
        found += goes_on(engine, cache, 6, 70)
    found += tiered.feed(engine.model, cache, helpers.prompt(1, 150, seed=2), [150])
    return [x.clone() for x in found]


def two(engine: Any) -> list[Tensor]:
    """Two caches in turn, of one and of two sequences."""
    (a, found), (b, others) = begun(engine), begun(engine, 2, seed=5)
    for token in range(3):
        found += goes_on(engine, a, token, 1) + goes_on(engine, b, token, 1)
    return found + others


SCRIPTS: dict[str, list[Callable[[Any], list[Tensor]]]] = {
    "full": [forks, copies, beams, again, mixed, two],
    "snapkv:budget=0.6": [forks, beams, two],
    "keyformer:budget=0.6+quant": [forks, copies, again],
    "h2o:budget=0.6": [apart],
}
CASES = [(recipe, script) for recipe, scripts in SCRIPTS.items() for script in scripts]


@pytest.mark.parametrize(("recipe", "script"), CASES)
def test_whatever_happens_to_a_cache(
    recipe: str, script: Callable[[Any], list[Tensor]], tmp_path: Path
) -> None:
    model, runs = tiered.model(), {}
    for way in ("all", "host" if script in (copies, two) else "both"):
        with tiered.attached(model, recipe, tiered.caps(way, model, recipe, 3, tmp_path)) as engine:
            runs[way] = script(engine)
            engine.newest.__init__()
            assert tiered.used(engine.spec.tiers) == (0, 0, 0)
    given, expected = runs.values()
    with kvpress.attach(model, recipe) as engine:
        plain = script(engine)
    for a, b, c in zip(given, expected, plain, strict=True):
        assert torch.equal(a, b)
        if "quant" not in recipe:
            torch.testing.assert_close(a, c, **ALIKE)


def test_what_is_taken_back_comes_from_every_tier(tmp_path: Path) -> None:
    model, runs = tiered.model(), []
    for way in ("all", "both"):
        with tiered.attached(model, "full", tiered.caps(way, model, "full", 1, tmp_path)) as engine:
            cache, found = begun(engine)
            for tokens in (1, 60, 200):  # further than what is on the device
                cache.crop(-tokens)
                found += goes_on(engine, cache)
            runs.append(found)
            assert cache.states[0].rows.counts_BH.tolist() == [[TOKENS - 261 + 12] * 2]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": 1},
        {"num_beams": 2, "num_return_sequences": 2, "prefill_chunk_size": 200},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["full", "snapkv:budget=0.6"])
def test_generate_gives_the_same_tokens(recipe: str, more: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiered.model(), helpers.prompt(1, TOKENS)
    more = {"max_new_tokens": 16, "do_sample": False} | more
    if "assistant_model" in more:
        more["assistant_model"] = tiered.model(num_hidden_layers=1)
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **more)
    with tiered.attached(model, recipe, tiered.caps("both", model, recipe, 4, tmp_path)) as engine:
        assert torch.equal(engine.generate(ids, **more), expected)
        tiered.check(engine, engine.cache)


def test_rows_of_a_padded_batch_are_as_they_are_alone(tmp_path: Path) -> None:
    model, lengths = tiered.model(), [560, 130, 340]
    ids, mask = helpers.padded(lengths, "left")
    caps = tiered.caps("both", model, "full", 3, tmp_path)
    with tiered.attached(model, "full", caps) as engine:
        batch = helpers.greedy(model, ids, mask, 12, cache := engine.new_cache())
        assert tiered.below(cache)
        del cache
        for row, length in enumerate(lengths):
            own, every = ids[row : row + 1, -length:], torch.ones(1, length, dtype=torch.long)
            alone = helpers.greedy(model, own, every, 12, engine.new_cache())
            assert torch.equal(alone[0], batch[row])
    with tiered.attached(model, "full", tiered.ALL) as engine:
        assert torch.equal(helpers.greedy(model, ids, mask, 12, engine.new_cache()), batch)


def test_two_caches_in_two_threads(tmp_path: Path) -> None:
    model, found = tiered.model(), {}
    caps = tiered.caps("both", model, "full", 3, tmp_path)

    def work(engine: Any, seed: int) -> None:
        try:
            cache, logits = begun(engine, 1, seed)
            for token in range(3):
                logits += goes_on(engine, cache, token, 1)
            found[seed] = logits
        except BaseException as error:
            found[seed] = error

    with tiered.attached(model, "full", caps) as engine:
        threads = [threading.Thread(target=work, args=(engine, seed)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        at_once = dict(found)
        for seed in (1, 2):
            work(engine, seed)
            for a, b in zip(at_once[seed], found[seed], strict=True):
                assert torch.equal(a, b)


def test_what_a_cache_held_is_free_when_it_ends(tmp_path: Path) -> None:
    model = tiered.model()
    caps = tiered.caps("both", model, "full", 2, tmp_path)
    with tiered.attached(model, "full", caps) as engine:
        tiers = engine.spec.tiers
        engine.generate(helpers.prompt(1, 5), max_new_tokens=1)  # the last one is kept
        for how in ("dropped", "reset", "selected"):
            cache, _ = begun(engine, 2)
            before = tiered.used(tiers)
            assert min(before) > 0
            if how == "reset":
                cache.reset()
            elif how == "selected":
                cache.batch_select_indices(torch.tensor([0]))
                assert sum(tiered.used(tiers)) < sum(before)
            del cache
            gc.collect()
            assert tiered.used(tiers) == (0, 0, 0), how


def test_a_pipeline_generates_text(tmp_path: Path) -> None:
    model = tiered.model()
    made = pipeline("text-generation", model=model, tokenizer=helpers.characters(), device="cpu")
    text = "what is kept is not forgotten. " * 16
    more = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    expected = made(text, **more)
    with tiered.attached(model, "full", tiered.caps("both", model, "full", 1, tmp_path)) as engine:
        assert made(text, **more) == expected
        assert tiered.below(engine.cache)


def test_where_gradients_are_asked_for_they_are_those_of_the_model(tmp_path: Path) -> None:
    """A pass with gradients over pages that are elsewhere."""
    model, ids = tiered.model(), helpers.prompt(1, TOKENS)
    with tiered.attached(model, "full", tiered.caps("both", model, "full", 1, tmp_path)) as engine:
        cache = engine.new_cache()
        tiered.feed(model, cache, ids[:, :-9], [TOKENS - 9])
        logits = model(ids[:, -9:], past_key_values=cache).logits
    expected = model(ids).logits[:, -9:]
    torch.testing.assert_close(logits, expected, **ALIKE)
