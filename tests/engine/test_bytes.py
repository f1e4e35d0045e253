"""The ledger counts live storages, and memory is really freed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch

import kvpress

RECIPES = ["full", "keyformer:budget=0.5", "streaming_llm:budget=0.2", "snapkv:budget=0.3,window=8"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_held_are_those_of_all_tensors_that_the_cache_keeps_alive(
    recipe: str, family: str
) -> None:
    model, (ids, mask) = helpers.tiny(family), helpers.padded([90, 41], "left")
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache()
        for new in (1, 20):
            cache.reset()
            helpers.greedy(model, ids, mask, new, cache)
            per_layer = [helpers.live_storages(state.store) for state in cache.states]
            report = cache.report()
            assert [layer.bytes_held for layer in report.layers] == per_layer
            assert report.bytes_held == sum(per_layer)
            counters = [  # per sequence, outside the store; layers share some of them
                t
                for state in cache.states
                for t in (
                    *(
                        state.sequences.seen_B,
                        state.sequences.quota_R,
                        state.sequences.recent_R,
                        state.sequences.sink_B,
                        state.sequences.decoded.tokens_B,
                    ),
                    *(
                        state.sequences.demand_B,
                        state.sequences.portion_R,
                        state.sequences.guarded_B,
                        state.sequences.planned_B,
                        state.sequences.looked_B,
                        state.sequences.threshold_B,
                    ),
                )
            ] + list(cache.states[0].context.newest or ())
            counters += helpers.live_tensors(cache.context.growth)
            storages = (t.untyped_storage() for t in counters)
            books = {storage.data_ptr(): storage.nbytes() for storage in storages}
            assert report.bytes_ids == 4 * 2 * cache.columns_seen
            held = report.bytes_held + report.bytes_ids + sum(books.values())
            assert helpers.live_storages(cache) == held


def test_the_report_is_an_object_a_dictionary_and_a_table() -> None:
    from rich.console import Console

    model = helpers.tiny()
    with kvpress.attach(model, "keyformer:budget=0.5") as engine:
        engine.generate(helpers.prompt(2, 64), max_new_tokens=3, do_sample=False)
        report = engine.report()
    assert report.tokens_seen == [66, 66]
    assert report.slots_kept == [[[33] * 2] * 2] * 3
    assert report.bytes_full == 66 * 2 * 2 * 3 * 2 * 16 * 4
    data = json.loads(json.dumps(report.to_dict()))
    assert data["slots_kept"] == report.slots_kept
    assert data["fraction"] == pytest.approx(report.bytes_held / report.bytes_full)
    assert set(data["stages"]) == {
        "prefill attention", "second look", "observe", "select", "merge", "refit", "store",
        "format", "decode attention",
    }  # fmt: skip
    idle = {"second look", "merge", "refit", "format"}
    assert all((seconds > 0) == (stage not in idle) for stage, seconds in data["stages"].items())
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(report)
    assert "keyformer" in console.export_text()


def test_short_prompts_are_explained() -> None:
    model = helpers.tiny()
    with kvpress.attach(model, "snapkv:budget=0.5,window=16") as engine:
        engine.generate(helpers.prompt(1, 20), max_new_tokens=1, do_sample=False)
        report = engine.report()
    assert report.slots_kept == [[[16] * 2]] * 3
    assert any("below the protected tokens (sink 0, recent 16)" in note for note in report.notes)


def test_a_cache_is_freed_with_its_last_reference() -> None:
    import gc
    import weakref

    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    with kvpress.attach(model, "h2o") as engine:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        pool = weakref.ref(engine.cache.states[0].store)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        gc.collect()
        assert pool() is None


@pytest.mark.real_model
def test_keyformer_holds_half_of_the_real_cache(demo: tuple) -> None:
    from kvpress.bench.common.prompt import reference_prompt

    model, tokenizer = demo
    ids = tokenizer(reference_prompt(tokenizer, 4000), return_tensors="pt")["input_ids"]
    with kvpress.attach(model, "keyformer:budget=0.5") as engine, torch.inference_mode():
        model(ids, logits_to_keep=1)
        report, cache = engine.report(), engine.cache
    assert 3900 <= report.tokens_seen[0] <= 4100
    assert {s for layer in report.slots_kept for row in layer for s in row} == {ids.shape[1] // 2}
    assert report.bytes_full == ids.shape[1] * 45 * 1024  # 30 layers × 3 heads × 2 × 64 × 4 bytes
    assert report.bytes_held == sum(helpers.live_storages(s.store) for s in cache.states)
    assert report.fraction <= 0.52
    assert cache.check_integrity()


GROWTH = """
import ctypes, gc, sys, torch, kvpress
from kvpress.bench.common import models, prompt
model, tokenizer = models.load("demo")
ids = tokenizer(prompt.reference_prompt(tokenizer, 4000), return_tensors="pt")["input_ids"]
def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096
with kvpress.attach(model, sys.argv[1]) as engine, torch.inference_mode():
    model(ids[:, :512], logits_to_keep=1)
    engine.cache.reset()
    before = resident()
    model(ids, logits_to_keep=1)
    print(resident() - before, engine.report().bytes_held)
"""


@pytest.mark.real_model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_grows_by_what_is_kept(demo: tuple) -> None:
    growth = {}
    for recipe in ("full", "streaming_llm:budget=0.1"):
        command = [sys.executable, "-c", GROWTH, recipe]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        growth[recipe] = [int(number) for number in out.split()]
    (full, full_held), (small, small_held) = growth.values()
    print(f"resident growth {full / 2**20:.0f} and {small / 2**20:.0f} MiB")
    assert full_held > 9 * small_held
    assert full > 0.9 * full_held  # the measurement sees the cache
    assert small < full / 3


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("interval", [1, 7])
def test_a_byte_budget_holds_at_every_step(page_size: int, interval: int) -> None:
    model, budget = helpers.tiny(), 60 * 1024
    recipe = f"h2o:budget={budget}B,interval={interval}"
    with kvpress.attach(model, recipe, page_size=page_size) as engine, torch.no_grad():
        cache, token = engine.new_cache(), helpers.prompt(2, 1)
        model(helpers.prompt(2, 4), past_key_values=cache)
        held = []
        for _ in range(150):
            model(token, past_key_values=cache)
            held.append(cache.report().bytes_held)
    assert max(held) <= 2 * budget
    assert max(held) > 0.85 * 2 * budget


def test_a_long_interval_allocates_no_more_than_a_page_in_advance() -> None:
    model = helpers.tiny()
    with kvpress.attach(model, "h2o:budget=0.5,interval=100000") as engine, torch.no_grad():
        model(helpers.prompt(1, 64))
        assert engine.report().fraction < 0.85


def test_the_peak_is_that_of_the_whole_run() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        engine.generate(ids, max_new_tokens=200, do_sample=False)
        report = engine.report()
        assert report.bytes_peak == report.bytes_held
        engine.cache.crop(-150)
        assert engine.report().bytes_held < report.bytes_held == engine.report().bytes_peak
        assert engine.cache.fork().report().bytes_peak > 0
        engine.cache.reset()
        assert engine.report().bytes_peak == 0
    with kvpress.attach(model, "h2o:budget=0.9") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.activate_past_recording()
        model(helpers.prompt(1, 9), past_key_values=cache)
        drafted = sum(state.bytes_held for state in cache.states)
        cache.crop(-8)
        assert cache.report().bytes_held < drafted <= cache.report().bytes_peak


@pytest.mark.parametrize(
    "recipe",
    [
        *("full", "h2o:budget=60", "streaming_llm:budget=40,interval=30", "tova:budget=40"),
        *("quant:residual=4,guard=none", "h2o:budget=90+think:recent=8,window=8", "d2o:budget=0.5"),
    ],
)
def test_nothing_that_was_held_is_above_the_peak(recipe: str) -> None:
    """Looked at after every pass; a report is asked for only once something was given back."""
    model, token = helpers.tiny(), helpers.prompt(2, 1)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache, most = engine.new_cache(), 0

        def look() -> None:
            nonlocal most
            held = sum(state.bytes_held for state in cache.states)
            most = max(most, held)
            assert held == most or cache.report().bytes_peak >= most

        for turn in range(2):
            model(helpers.prompt(2, 70), past_key_values=cache)
            look()
            for _ in range(100):
                model(token, past_key_values=cache)
                look()
            cache.activate_past_recording()
            model(helpers.prompt(2, 9), past_key_values=cache)
            look()
            cache.crop(-4)
            cache.stop_past_recording()
            cache.batch_repeat_interleave(2 - turn)
            look()
            cache.batch_select_indices(torch.tensor([0, 1]))
        raw = 2 * 70 * 2 * 2 * 16 * 4  # new keys and values of a prompt and layer
        peak = cache.report().bytes_peak
        page = sum(state.store.paging.page_bytes() for state in cache.states)
        assert most <= peak <= most + raw + 16 * page


@pytest.mark.parametrize(
    ("recipe", "prompt", "tokens", "change"),
    [
        ("full", 20, 60, lambda feed, cache: cache.crop(-70)),
        ("full", 20, 60, lambda feed, cache: cache.batch_select_indices(torch.tensor([1]))),
        ("streaming_llm:budget=20,interval=64", 25, 63, lambda feed, cache: feed(1)),
        ("quant:residual=4,guard=none", 20, 47, lambda feed, cache: feed(1)),
        ("h2o:budget=20,interval=0", 25, 0, lambda feed, cache: cache.stop_past_recording()),
        ("streaming_llm:budget=20,interval=0", 25, 90, lambda feed, cache: feed(40)),
    ],
    ids=["crop", "select", "evict", "pack", "commit", "prompt"],
)
def test_the_peak_is_noted_before_memory_is_given_back(
    recipe: str, prompt: int, tokens: int, change: Callable[[Any, Any], Any]
) -> None:
    """Whichever way it is; and again after a reset."""
    model = helpers.tiny()
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()

        def feed(new: int) -> None:
            model(helpers.prompt(4, new), past_key_values=cache)

        for _ in range(2):
            feed(prompt)
            for _ in range(tokens):
                feed(1)
            if not tokens:
                cache.activate_past_recording()
                feed(30)
            before, seen = sum(state.bytes_held for state in cache.states), cache.columns_seen
            change(feed, cache)
            assert sum(state.bytes_held for state in cache.states) < before
            new = max(0, cache.columns_seen - seen)
            own = new * 4 * 2 * 2 * 16 * 4 if new > 1 else 0  # keys and values of one layer
            assert cache.report().bytes_peak >= before + own
            cache.reset()
            assert cache.report().bytes_peak == 0


@pytest.mark.parametrize("recipe", ["full", "quant", "think", "keyformer:budget=1.0"])
def test_a_short_text_is_told_why_it_holds_more_than_an_uncompressed_one(recipe: str) -> None:
    model = helpers.tiny()
    with kvpress.attach(model, recipe) as engine:
        engine.generate(helpers.prompt(1, 31), max_new_tokens=3, do_sample=False)
        short = engine.report()
        engine.generate(helpers.prompt(1, 31), max_new_tokens=17, do_sample=False)
        filled = engine.report()
        engine.generate(helpers.prompt(1, 600), max_new_tokens=3, do_sample=False)
        long = engine.report()
    kept = short.slots_kept[0][0][0]
    (note,) = [note for note in short.notes if "whole pages" in note]
    page = 8 if recipe in ("quant", "think") else 16  # of slots that stay as they came
    room = -(-kept // page) * page
    assert f"pages of {page} slots, and {kept / room:.0%} of these" in note
    assert f"takes {short.fraction:.0%} of the bytes" in note
    assert 1.1 < short.fraction < 1.6
    for report in (filled, long):
        assert not any("whole pages" in note for note in report.notes)
