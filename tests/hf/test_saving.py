"""Saved caches: what is loaded goes on as if it had not been saved, and nothing else is loaded."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpress
from kvpress.errors import CacheError, CacheFileError, PolicyError
from kvpress.store import sealed

RECIPES = [
    "full",
    "snapkv:budget=0.5,window=8",
    "streaming_llm:budget=0.5",
    "keyformer:budget=0.5",
    "h2o:budget=0.4,interval=7",
    "tova:budget=24KiB",
]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_cache_goes_on_where_it_was(recipe: str, family: str, tmp_path: Path) -> None:
    model, (ids, mask) = helpers.tiny(family), helpers.padded([60, 31], "left")
    file, steps = tmp_path / "cache.safetensors", helpers.prompt(2, 12, seed=3).split(1, dim=1)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache(max_new_tokens=20)
        model(ids, attention_mask=mask, past_key_values=cache)
        model(steps[0], past_key_values=cache)
        cache.save(file)
        held = helpers.positions(cache), helpers.positions(cache, 1)
        expected = [model(step, past_key_values=cache).logits for step in steps]
    with kvpress.attach(helpers.tiny(family), recipe) as other, torch.no_grad():
        loaded = other.load_cache(file)
        assert loaded.check_integrity()
        assert (helpers.positions(loaded), helpers.positions(loaded, 1)) == held
        given = [other.model(step, past_key_values=loaded).logits for step in steps]
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert loaded.report().slots_kept == cache.report().slots_kept
    assert list(tmp_path.iterdir()) == [file]


def test_the_next_turn_of_a_loaded_chat_is_the_same(tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 50)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    with kvpress.attach(model, "keyformer:budget=0.5") as engine:
        first = engine.generate(ids, **arguments)
        engine.cache.save(tmp_path / "chat")
        longer = torch.cat([first, helpers.prompt(1, 9, seed=4)], dim=1)
        expected = engine.generate(longer, cache=engine.cache, **arguments)
        loaded = engine.load_cache(tmp_path / "chat")
        assert torch.equal(engine.generate(longer, cache=loaded, **arguments), expected)


def test_beams_forks_and_half_precision_are_saved_with_their_own_pages_only(tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 300)
    recipe, dtype = "keyformer:budget=0.5", torch.bfloat16
    with kvpress.attach(model, recipe, cache_dtype=dtype, page_size=8) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "one")
        fork = cache.fork()
        model(ids, past_key_values=fork)
        fork.batch_repeat_interleave(4)
        fork.save(tmp_path / "beams")
        step = torch.tensor([[5], [6], [7], [8]])
        expected = model(step, past_key_values=fork).logits
    with kvpress.attach(helpers.tiny(), recipe) as other, torch.no_grad():
        loaded = other.load_cache(tmp_path / "beams")
        assert other.model(step, past_key_values=loaded).logits.equal(expected)
        assert loaded.states[0].store.paging.pages("key").dtype == dtype
        assert loaded.check_integrity()
    sizes = [(tmp_path / name).stat().st_size for name in ("one", "beams")]
    assert sizes[1] < 2.8 * sizes[0]  # twice the tokens, four masses


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    with kvpress.attach(helpers.tiny(), "full") as engine:
        engine.new_cache().save(tmp_path / "cache")
        assert engine.load_cache(tmp_path / "cache").get_seq_length() == 0


def test_forks_and_loaded_caches_say_whether_they_hold_tokens(tmp_path: Path) -> None:
    with kvpress.attach(helpers.tiny(), "h2o:budget=0.5") as engine, torch.no_grad():
        cache = engine.new_cache()
        for filled in (False, True):
            cache.save(tmp_path / "cache")
            others = (cache.fork(), engine.load_cache(tmp_path / "cache"))
            assert [other.is_initialized for other in others] == [filled, filled]
            engine.model(helpers.prompt(2, 20), past_key_values=cache)


def test_a_loaded_cache_refuses_a_text_that_does_not_go_on_from_it(tmp_path: Path) -> None:
    with kvpress.attach(helpers.tiny(), "full") as engine:
        text = engine.generate(helpers.prompt(1, 20), max_new_tokens=5, do_sample=False)
        engine.cache.save(tmp_path / "chat")
        loaded = engine.load_cache(tmp_path / "chat")
        assert torch.equal(loaded.ids.all(), engine.cache.ids.all())
        other = torch.cat([text, text], dim=1)
        other[0, 7] += 1
        with pytest.raises(CacheError, match="do not go on from this cache"):
            engine.generate(other, cache=loaded, max_new_tokens=5)


def test_a_loaded_cache_takes_back_as_little_as_the_saved_one(tmp_path: Path) -> None:
    """When tokens were last evicted is part of what is saved."""
    with kvpress.attach(helpers.tiny(), "streaming_llm:budget=30,interval=4") as engine:
        cache = engine.new_cache()
        with torch.no_grad():
            engine.model(helpers.prompt(1, 60), past_key_values=cache)
            for token in helpers.prompt(1, 6, seed=2).split(1, dim=1):
                engine.model(token, past_key_values=cache)
        assert {state.evicted_at for state in cache.states} == {64}
        cache.save(tmp_path / "cache")
        loaded = engine.load_cache(tmp_path / "cache")
        for one in (cache, loaded):
            with pytest.raises(CacheError, match="evicted tokens at 64"):
                one.crop(-3)
            one.crop(-2)
        assert helpers.positions(loaded) == helpers.positions(cache)


def test_rows_that_keep_more_bits_keep_them_when_they_are_loaded(tmp_path: Path) -> None:
    recipe = "quant:key_bits=2,value_bits=2,guard=0.35,residual=8"
    model, steps = helpers.tiny(), helpers.prompt(1, 140, seed=2)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 100), past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded = engine.load_cache(tmp_path / "cache")
        wide = [state.store.aging.decided.format_R.tolist() for state in cache.states]
        assert {flag for rows in wide for flag in rows} == {True, False}
        assert [state.store.aging.decided.format_R.tolist() for state in loaded.states] == wide
        assert loaded.report().notes == cache.report().notes
        # Until pages are packed that were not when it was saved.
        given, expected = (
            [model(steps[:, i : i + 20], past_key_values=one).logits for i in range(0, 140, 20)]
            for one in (loaded, cache)
        )
        assert all(map(torch.equal, given, expected))
        assert loaded.report().bytes_held == cache.report().bytes_held


def test_last_queries_are_in_memory_of_their_own(tmp_path: Path) -> None:
    """Not in the file, which somebody may write to or cut."""
    file = tmp_path / "cache"
    with kvpress.attach(helpers.tiny(), "think:keep=0.5") as engine, torch.no_grad():
        cache = engine.new_cache()
        for part in helpers.prompt(1, 50).split(25, 1):  # a longer one is packed at once
            engine.model(part, past_key_values=cache)
        expected = [state.sequences.watched[0].clone() for state in cache.states]
        cache.save(file)
        loaded = engine.load_cache(file)
        with open(file, "r+b") as opened:
            opened.write(b"\0" * file.stat().st_size)
            opened.truncate(0)
        given = [state.sequences.watched[0] for state in loaded.states]
        assert all(map(torch.equal, given, expected))
        assert all(query.untyped_storage().nbytes() == query.nbytes for query in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modes_and_defaults_of_the_process_do_not_matter(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 208)
    recipe = "h2o:budget=0.5+think:keep=0.5,recent=8+quant:residual=8"
    with kvpress.attach(model, recipe) as engine:
        with torch.inference_mode():
            model(ids[:, :200])
        cache = engine.cache
        torch.set_default_dtype(dtype)
        try:
            with torch.inference_mode():
                cache.save(tmp_path / "cache")
                loaded = engine.load_cache(tmp_path / "cache")
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for step in ids[:, 200:].split(1, dim=1):
                given, expected = (
                    model(step, past_key_values=one).logits for one in (loaded, cache)
                )
                assert torch.equal(given, expected)


def saved(path: Path, recipe: str = "h2o", tokens: int = 8) -> object:
    engine = kvpress.attach(helpers.tiny(num_hidden_layers=1), recipe, page_size=4)
    with torch.no_grad():
        engine.model(helpers.prompt(1, tokens))
    engine.cache.save(path)
    return engine


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    engine, draw = saved(tmp_path / "cache"), random.Random(0)
    whole = (tmp_path / "cache").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [draw.randrange(header) for _ in range(500)]
    places += [draw.randrange(len(whole)) for _ in range(500)]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= draw.randrange(1, 256)
        (tmp_path / "cache").write_bytes(altered)
        with pytest.raises(CacheFileError):
            engine.load_cache(tmp_path / "cache")
    (tmp_path / "cache").write_bytes(whole)
    assert engine.load_cache(tmp_path / "cache").get_seq_length() == 8


def test_every_cut_and_every_addition_is_noticed(tmp_path: Path) -> None:
    engine = saved(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    for data in (*(whole[:n] for n in range(0, len(whole), 97)), whole + b"\0", b"", b"{}"):
        (tmp_path / "cache").write_bytes(data)
        with pytest.raises(CacheFileError, match="cut off or altered"):
            engine.load_cache(tmp_path / "cache")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    engine, file = saved(tmp_path / "cache"), tmp_path / "cache"
    with pytest.raises(CacheFileError, match="cannot be read"):
        engine.load_cache(tmp_path / "missing")
    facts, tensors = sealed.read(file).facts, load_file(file)
    for name, value, remedy in (
        ("engine", "0.0.9", "install that one"),
        ("format", 99, "this version of the engine"),
    ):
        sealed.write(tmp_path / "other", tensors, facts | {name: value})
        with pytest.raises(CacheFileError, match=rf"{name}={value!r}.*{remedy}"):
            engine.load_cache(tmp_path / "other")
    save_file(tensors, tmp_path / "other", {k: json.dumps(v) for k, v in facts.items()})
    with pytest.raises(CacheFileError, match="no checksum"):
        engine.load_cache(tmp_path / "other")
    engine.detach()
    with pytest.raises(CacheFileError, match=r"policy=.*Attach the engine with that policy"):
        kvpress.attach(helpers.tiny(num_hidden_layers=1), "full").load_cache(file)
    with pytest.raises(CacheFileError, match="Load the model that it was made with"):
        kvpress.attach(helpers.tiny(), "h2o").load_cache(file)
    other = helpers.tiny(
        num_hidden_layers=1, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    with pytest.raises(CacheFileError, match="with the same config"):
        kvpress.attach(other, "h2o").load_cache(file)
    changed = helpers.tiny(num_hidden_layers=1)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CacheFileError, match="Load the weights that it was made with"):
        kvpress.attach(changed, "h2o").load_cache(file)


def test_a_cache_that_cannot_be_saved_leaves_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = saved(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(sealed, "_write", full_disk)
    with pytest.raises(CacheFileError, match=r"No space left.*Nothing was changed"):
        engine.cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(CacheFileError, match="No such file"):
        engine.cache.save(tmp_path / "no folder" / "cache")


def test_a_cache_does_not_keep_its_model_alive_and_cannot_be_saved_without_it(
    tmp_path: Path,
) -> None:
    import gc

    engine = saved(tmp_path / "cache")
    cache = engine.cache
    del engine
    gc.collect()
    with pytest.raises(CacheError, match="engine that made this cache is gone"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize("recipe", ["full", "h2o:budget=0.5", "keyformer:budget=0.5+think+quant"])
def test_a_cache_is_not_pickled_but_copied(recipe: str, tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 150)
    steps = helpers.prompt(1, 6, seed=3).split(1, dim=1)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        for dump in (pickle.dumps, lambda x: torch.save(x, tmp_path / "cache")):
            with pytest.raises(CacheError, match=r"cannot be pickled.*cache.save\(path\)"):
                dump({"cache": cache})
        copies = [copy.deepcopy(cache), copy.copy(cache), copy.deepcopy([cache, cache])[1]]
        expected = [model(step, past_key_values=cache).logits for step in steps]
        for other in copies:
            assert other.get_seq_length() == 150
            given = [model(step, past_key_values=other).logits for step in steps]
            assert all(map(torch.equal, given, expected))
            other.save(tmp_path / "copy")
            assert engine.load_cache(tmp_path / "copy").get_seq_length() == 156


ANY_RECIPE = [
    *RECIPES,
    "keyformer:budget=0.4,interval=3",
    "streaming_llm:budget=20,sink=3,interval=5",
    "knorm:budget=0.5,interval=1",
    "tova:budget=0.3",
    "random:budget=0.5,interval=3",
    "d2o:budget=0.4",
    "d2o:budget=0.3,interval=4",
    "h2o:budget=0.6+think:keep=0.5,recent=8+quant:residual=8",
    "streaming_llm:budget=48,sink=0+quant:residual=16",
    "quant:key_bits=2,value_bits=2,guard=0.05,residual=8",
    "think:keep=0.5,recent=8",
]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("recipe", ANY_RECIPE)
@torch.no_grad()
def test_whatever_happened_to_a_cache_it_is_loaded_again(
    recipe: str, family: str, tmp_path: Path
) -> None:
    """What is refused as impossible must be so: turns, chunks, crops, drafts, beams, padding."""
    draw, model = random.Random(f"{recipe} {family}"), helpers.tiny(family)
    with kvpress.attach(model, recipe, page_size=draw.choice([3, 16])) as engine:
        cache, mask = engine.new_cache(), torch.zeros(2, 0, dtype=torch.long)

        def feed(ids: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
            nonlocal mask
            mask = torch.cat([mask, torch.ones_like(ids) if real is None else real], dim=1)
            place = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given = {"attention_mask": mask, "position_ids": place, "past_key_values": cache}
            return model(ids, **given).logits

        def choose(index: list[int], do: Callable[[], None]) -> None:
            nonlocal mask
            do()
            mask = mask[index]

        for turn in range(14):
            batch, last = len(mask), mask.shape[1]
            match draw.choice(
                ["chunk", "chunk", "steps", "steps", "padded", "crop", "draft", "more"]
            ):
                case "chunk" | "padded" if turn == 0 or draw.random() < 0.3:
                    lengths = [draw.randrange(1, 90) for _ in range(batch)]
                    feed(*helpers.padded(lengths, "left", turn))
                case "chunk":
                    feed(helpers.prompt(batch, draw.randrange(1, 60), turn))
                case "steps":
                    for i in range(draw.randrange(1, 8)):
                        feed(helpers.prompt(batch, 1, turn + i))
                case "crop" if last > 4:
                    with contextlib.suppress(CacheError):
                        taken = draw.randrange(1, 4)
                        cache.crop(-taken)
                        mask = mask[:, :-taken]
                case "draft" if last:
                    cache.activate_past_recording()
                    with contextlib.suppress(PolicyError):
                        feed(helpers.prompt(batch, 4, turn))
                        cache.crop(-2)
                        mask = mask[:, :-2]
                    cache.stop_past_recording()
                case "more" if last and batch < 5:
                    choose(
                        [i for i in range(batch) for _ in range(2)],
                        lambda: cache.batch_repeat_interleave(2),
                    )
                case "more" if last:
                    index = draw.choices(range(batch), k=2)
                    choose(
                        index, lambda index=index: cache.batch_select_indices(torch.tensor(index))
                    )
            cache.save(tmp_path / "cache")
            loaded = engine.load_cache(tmp_path / "cache")
            assert loaded.report().slots_kept == cache.report().slots_kept
            assert torch.equal(loaded.ids.all(), cache.ids.all())
        if mask.shape[1]:
            kept, before, ids = cache, mask, helpers.prompt(len(mask), 5)
            expected = feed(ids)
            cache, mask = loaded, before
            assert torch.equal(feed(ids), expected)
            assert helpers.positions(kept) == helpers.positions(loaded)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from kvpress.store import sealed
path, draw, partial = Path(sys.argv[1]), random.Random(0), 0
facts, tensors = sealed.read(path)
for _ in range(100):
    child = os.fork()
    while child == 0:
        sealed.write(path, tensors, facts)
    time.sleep(draw.uniform(0.001, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = list(path.parent.glob(".*.partial"))
    assert len(left) <= 1  # each next process removes what the one before it left
    partial += len(left)
    assert sealed.read(path).facts == facts
print(partial)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    engine = saved(tmp_path / "cache", "full", tokens=1000)
    command = [sys.executable, "-c", KILLS, str(tmp_path / "cache")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other threads do not survive a fork
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) > 10  # so many were killed in the middle of it
    engine.cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]
    assert engine.load_cache(tmp_path / "cache").get_seq_length() == 1000


def test_weights_that_change_under_an_engine_are_noticed(tmp_path: Path) -> None:
    engine = saved(tmp_path / "cache")
    cache = engine.cache
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.add_(0.05)
    with pytest.raises(CacheFileError, match="Load the weights"):
        engine.load_cache(tmp_path / "cache")
    assert engine.cache is cache  # a failed load changes nothing
