"""Loads that begin by another query than the layer's own change when pages are there, no bit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import torch
from torch import Tensor

import kvpress
from kvpress.errors import PolicyError, TierError, UnsupportedModelError
from kvpress.formulas.hadamard import turned
from kvpress.pipe.stages import retrieve
from kvpress.store.steps import Steps
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.early import Early

TOKENS = 560
LAYER, STEP = "guess=layer", "guess=step"
GUESSES = {
    "quest:dense=0,read=160": LAYER,
    "leoam:read=0.3": LAYER,
    "freekv:dense=0,read=160,turn=-1": STEP,
}


def with_guess(recipe: str, guess: str = "") -> str:
    """The recipe whose first policy guesses, as its entry says or as is given."""
    first, *rest = recipe.split("+")
    return "+".join([f"{first},{guess or GUESSES[first]}", *rest])


def run(model: Any, recipe: str, new: int = 16, **caps: Any) -> tuple[list[Tensor], Any]:
    """Logits of a prompt and of steps behind it, and the cache."""
    with tiered.attached(model, recipe, caps) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        found = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        found += tiered.decode(model, cache, found[-1], new)
        tiered.check(engine, cache)
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)
        return found, cache


def same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def figures(cache: Any) -> dict[str, int]:
    """Pages of all layers; see `Moves`."""
    own = [layer.reads for layer in cache.report().layers if layer.reads is not None]
    names = ("adjacent", "again", "missing", "ahead", "vain")
    return {name: sum(getattr(x, name) for x in own) for name in names}


def slack(model: Any, recipe: str, way: str, folder: Path, pages: int) -> dict[str, Any]:
    """Caps of a device with room for some more bytes than it needs."""
    caps = tiered.caps(way, model, recipe, 2, folder)
    return {**caps, "device": caps["device"] + pages}


@pytest.mark.parametrize("way", tiered.LOWER)
@pytest.mark.parametrize("recipe", [*GUESSES, "quest:dense=0,read=160+quant"])
def test_guesses_change_no_bit(recipe: str, way: str, tmp_path: Path) -> None:
    model = tiered.model()
    first = recipe.split("+")[0]
    none, guess = with_guess(recipe, "guess=none"), with_guess(recipe, GUESSES[first])
    expected, resident = run(model, none, **tiered.ALL)
    assert not figures(resident)["missing"]
    for more in (0, 60_000):
        given, cache = run(model, guess, **slack(model, none, way, tmp_path, more))
        assert same(given, expected), more
        found = figures(cache)
        assert found["adjacent"] == figures(resident)["adjacent"]
        assert found["again"] == figures(resident)["again"]
        assert found["missing"] and found["ahead"] <= found["missing"]
    assert found["ahead"]


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2", "olmo2", "gemma2", "cohere", "opt"])
def test_whatever_makes_queries(family: str, tmp_path: Path) -> None:
    model = helpers.sharp(family)
    none, guess = (f"quest:dense=0,read=128,guess={x}" for x in ("none", "layer"))
    expected, _ = run(model, none, 8, **tiered.ALL)
    given, _ = run(model, guess, 8, **tiered.caps("host", model, none, 2, tmp_path))
    assert same(given, expected)


@pytest.mark.parametrize("copies", ["LateCopies", "ShuffledCopies"])
@pytest.mark.parametrize("recipe", GUESSES)
def test_late_copies_and_threads_change_nothing(
    recipe: str, copies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = tiered.model(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected, _ = run(model, with_guess(recipe, "guess=none"), 8, **tiered.ALL)
        monkeypatch.setattr("kvpress.store.tiers.tiers.copies", getattr(tiered, copies))
        caps = slack(model, recipe, "both", tmp_path, 40_000)
        given, _ = run(model, with_guess(recipe), 8, **caps)
        assert same(given, expected)
    finally:
        torch.set_num_threads(before)


# ---- figures


class Recount:
    """What moves, counted in plain sets as loads begin and steps choose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.missing = self.ahead = self.vain = 0
        self._begun: dict[int, set[int]] = {}
        waits, stages, brings = Steps.wait_for, Steps.stage, Steps.bring

        def wait_for(own: Any, coming: Any, id_A: Tensor) -> None:
            waits(own, coming, id_A)
            self._begun.setdefault(id(own), set()).update(id_A.tolist())

        def stage(own: Any) -> None:
            stages(own)
            if own._staged is not None:
                self._begun.setdefault(id(own), set()).update(own._staged.id_A.tolist())

        def bring(own: Any, id_A: Tensor, staged: bool, rows: Any) -> Any:
            begun, at_P = self._begun.pop(id(own), set()), own.shelf.directory.at_P
            lost = own._staged is not None and own._staged.lost
            chosen = set(id_A.tolist())
            here = {page for page in chosen if int(at_P[page]) != NOWHERE} - begun
            found = chosen & begun
            if lost:
                found -= set(own._staged.id_A.tolist())
            self.missing += len(chosen - here)
            self.ahead += len(found)
            self.vain += len(begun - found)
            return brings(own, id_A, staged, rows)

        for name, made in (("wait_for", wait_for), ("stage", stage), ("bring", bring)):
            monkeypatch.setattr(Steps, name, made)


def sets(state: Any) -> list[set[int]]:
    """The places that the last step of a layer chose, by row."""
    (own,) = state.reads.last[1].chosen
    counts = own.pages_r.tolist()
    return [set(row[:n].tolist()) for row, n in zip(own.place_rW, counts, strict=True)]


@pytest.mark.parametrize("more", [0, 60_000])
@pytest.mark.parametrize(
    "recipe",
    [*map(with_guess, GUESSES), "leoam:read=0.3", "specontext:head=self,read=160,sure=0"],
)
def test_figures_are_those_of_a_plain_recount(
    recipe: str, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiered.model()
    with tiered.attached(model, recipe, slack(model, recipe, "both", tmp_path, more)) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        logits = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        counted, adjacent, again = Recount(monkeypatch), 0, 0
        before: list[list[set[int]]] | None = None
        for _ in range(16):
            logits = tiered.decode(model, cache, logits[-1], 1)
            chosen = [sets(state) for state in cache.states]
            for own, last in zip(chosen, before or (), strict=bool(before)):
                adjacent += sum(map(len, own))
                again += sum(len(a & b) for a, b in zip(own, last, strict=True))
            before = chosen
        found = figures(cache)
        assert (found["adjacent"], found["again"]) == (adjacent, again)
        wanted = (counted.missing, counted.ahead, counted.vain)
        assert (found["missing"], found["ahead"], found["vain"]) == wanted
        assert bool(found["ahead"]) == (recipe != "leoam:read=0.3")
        report = str(cache.report())
        assert "the one before had chosen" in report
        assert ("were loaded ahead in vain" in report) == bool(found["ahead"])


def test_of_beams_each_row_is_compared_with_itself(tmp_path: Path) -> None:
    model, recipe = tiered.model(), with_guess("quest:dense=0,read=160")
    with tiered.attached(model, recipe, tiered.caps("host", model, recipe, 3, tmp_path)) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        cache.batch_repeat_interleave(3)  # rows that share every page
        token = torch.tensor([[5], [6], [7]])
        with torch.no_grad():
            model(token, past_key_values=cache)
            assert not figures(cache)["adjacent"], "nothing came before"
            first = [sets(state) for state in cache.states]
            model(token, past_key_values=cache)
            second = [sets(state) for state in cache.states]
            found = figures(cache)
            rows = list(zip(chain(*first), chain(*second), strict=True))
            assert found["adjacent"] == sum(len(b) for _, b in rows)
            assert found["again"] == sum(len(a & b) for a, b in rows)
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            model(token, past_key_values=cache)
            assert figures(cache)["adjacent"] == found["adjacent"], "rows are others now"
        del logits


def test_a_layer_that_adds_nothing_is_guessed_exactly(tmp_path: Path) -> None:
    model, recipe = tiered.model(), with_guess("quest:dense=0,read=160")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    _, cache = run(model, recipe, **slack(model, recipe, "host", tmp_path, 60_000))
    first, *rest = (layer.reads for layer in cache.report().layers)
    assert first.missing and not first.ahead, "no layer is before it"
    for own in rest:
        assert own.missing and own.ahead == own.missing and not own.vain


# ---- what else happens to caches


@pytest.mark.parametrize("recipe", GUESSES)
def test_forks_selections_files_and_crops_go_on_alike(recipe: str, tmp_path: Path) -> None:
    model = tiered.model()
    caps = slack(model, recipe, "host", tmp_path, 40_000)
    runs = []
    for own, size in (("guess=none", tiered.ALL), (GUESSES[recipe], caps)):
        with tiered.attached(model, with_guess(recipe, own), size) as engine:
            cache = engine.new_cache()
            found = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
            found += tiered.decode(model, cache, found[-1], 3)
            last = found[-1]
            cache.save(tmp_path / own)
            others = [cache.fork(), engine.load_cache(tmp_path / own), copy.deepcopy(cache)]
            others[0].reorder_cache(torch.tensor([1, 1]))
            for _ in range(3):  # in turn: they share pages, and what is on its way
                for one in (cache, *others):
                    found += tiered.decode(model, one, last, 1)
            cache.activate_past_recording()
            for _ in range(3):
                found += tiered.decode(model, cache, last, 2)
                cache.crop(-1)
            cache.stop_past_recording()
            found += tiered.decode(model, cache, last, 2)
            found += tiered.feed(model, cache, helpers.prompt(2, 90, 4), [90])
            found += tiered.decode(model, cache, last, 3)
            tiered.check(engine, cache, *others)
            assert tiered.nothing_stays_in_flight(engine.spec.tiers)
            runs.append(found)
    assert same(runs[1], runs[0])


@pytest.mark.parametrize("recipe", GUESSES)
@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {}])
def test_generation_gives_the_same_tokens(recipe: str, ways: Any, tmp_path: Path) -> None:
    model, ids = tiered.model(), helpers.prompt(1, 400)
    caps = slack(model, recipe, "host", tmp_path, 40_000)
    found = []
    for own, size in (("guess=none", tiered.ALL), (GUESSES[recipe], caps)):
        with tiered.attached(model, with_guess(recipe, own), size) as engine:
            mask = torch.ones_like(ids)
            found.append(engine.generate(ids, attention_mask=mask, max_new_tokens=20, **ways))
            tiered.check(engine, engine.cache)
    assert torch.equal(*found)


@pytest.mark.parametrize("recipe", GUESSES)
def test_padded_rows_read_what_they_read_without(recipe: str, tmp_path: Path) -> None:
    model = tiered.model()
    ids, mask = helpers.padded([500, 340], "left")
    caps = slack(model, recipe, "host", tmp_path, 40_000)
    found = []
    for own, size in (("guess=none", tiered.ALL), (GUESSES[recipe], caps)):
        with tiered.attached(model, with_guess(recipe, own), size) as engine:
            found.append(helpers.greedy(model, ids, mask, 12, engine.new_cache()))
    assert torch.equal(*found)


def _fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("on purpose")


@contextmanager
def failing(layer: Any) -> Iterator[None]:
    whole, layer.forward = layer.forward, _fails
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            yield
    finally:
        layer.forward = whole


@pytest.mark.parametrize("way", ["host", "disk"])
@pytest.mark.parametrize("recipe", GUESSES)
def test_loads_that_nobody_waits_for_leak_nothing(recipe: str, way: str, tmp_path: Path) -> None:
    model = tiered.model()
    caps = slack(model, recipe, way, tmp_path, 40_000)
    with tiered.attached(model, with_guess(recipe), caps) as engine:
        held = []
        for seed in range(4):
            cache = engine.new_cache()
            logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS, seed), [TOKENS])
            tiered.decode(model, cache, logits[-1], 3)
            layer = model.model.layers[seed % 3]
            with failing(layer):
                model(logits[-1][:, -1:].argmax(-1), past_key_values=cache)
            if seed == 0:  # it failed before a layer had a token
                tiered.decode(model, cache, logits[-1], 3)
                tiered.check(engine, cache)
            del cache, logits
            gc.collect()
            held.append(sum(tiered.used(engine.spec.tiers)))
        assert max(held[1:]) <= held[0], "the engine keeps the newest cache alone"
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)


@pytest.mark.parametrize("recipe", GUESSES)
def test_what_cannot_be_read_ahead_is_an_error_where_it_is_wanted(
    recipe: str, tmp_path: Path
) -> None:
    model = tiered.model()
    caps = slack(model, recipe, "disk", tmp_path, 40_000)
    with tiered.attached(model, with_guess(recipe), caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        file = engine.spec.tiers.vault._parts.disk
        read, file.read = file.read, lambda rows, arena_X, again=False: [5] * len(rows)
        with pytest.raises(TierError, match="could not be read"):
            tiered.decode(model, cache, logits[-1], 12)
        file.read = read
        other = engine.new_cache()
        found = tiered.feed(model, other, helpers.prompt(1, TOKENS), [TOKENS])
        tiered.decode(model, other, found[-1], 3)
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)
        tiered.check(engine, other)


@pytest.mark.parametrize("recipe", GUESSES)
def test_forks_in_threads_share_what_is_on_its_way(recipe: str, tmp_path: Path) -> None:
    model = tiered.model()
    with tiered.attached(model, with_guess(recipe, "guess=none"), tiered.ALL) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        wanted = tiered.decode(model, cache, logits[-1], 12)
    caps = slack(model, recipe, "host", tmp_path, 60_000)
    with tiered.attached(model, with_guess(recipe), caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        caches, found = [cache, cache.fork(), cache.fork()], {}

        def go(number: int) -> None:
            found[number] = tiered.decode(model, caches[number], logits[-1], 12)

        threads = [threading.Thread(target=go, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(same(found[number], wanted) for number in range(3))
        tiered.check(engine, *caches)


def test_a_page_that_came_twice_keeps_one_place(tmp_path: Path) -> None:
    model, recipe = tiered.model(), with_guess("quest:dense=0,read=160")
    with tiered.attached(model, recipe, slack(model, recipe, "host", tmp_path, 60_000)) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        tiered.decode(model, cache, logits[-1], 2)
        (shelf,) = {part.shelf for state in cache.states for part in state.rows.aging.parts}
        away_P = (shelf.directory.at_P == NOWHERE) & (shelf.directory.record_P != NOWHERE)
        id_A = away_P.nonzero().flatten()[:2]
        shelf.thin(4 * shelf.page_bytes)
        early: Early = shelf.early
        for _ in range(2):
            early.begin(id_A, shelf.arena.take(2, shelf.page_bytes))
        early.settle()
        assert bool((shelf.directory.at_P[id_A] != NOWHERE).all())
        tiered.check(engine, cache)


# ---- the model


def hooks_of(model: Any) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def test_a_model_is_left_and_copied_as_it_was(tmp_path: Path) -> None:
    model, recipe = tiered.model(), with_guess("quest:dense=0,read=160")
    before, own = model.config._attn_implementation, set(vars(model.model.layers[0]))
    ids = helpers.prompt(1, 40)
    with torch.no_grad():
        wanted = model(ids).logits
    with tiered.attached(model, recipe, tiered.caps("host", model, recipe, 1, tmp_path)):
        assert hooks_of(model) > 4
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert not hooks_of(twin) and twin.config._attn_implementation == before
            with torch.no_grad():
                assert torch.equal(twin(ids).logits, wanted)
    assert not hooks_of(model) and set(vars(model.model.layers[0])) == own
    model.train()
    with tiered.attached(model, recipe, tiered.caps("host", model, recipe, 1, tmp_path)):
        assert model.training and all(layer.training for layer in model.model.layers)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma3", "make another query"), ("falcon-new", "attention interface")],
)
def test_models_whose_queries_do_not_follow_are_refused(family: str, reason: str) -> None:
    model = helpers.sharp(family)
    before, caps = model.config._attn_implementation, {"device": "8MiB", "host": "8MiB"}
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*Use guess=none"):
        kvpress.attach(model, "leoam:guess=layer", **caps)
    assert not hooks_of(model) and model.config._attn_implementation == before
    with tiered.attached(model, "leoam", caps):  # and so it is free
        pass
    with kvpress.attach(model, "leoam:guess=layer"):  # nothing is loaded: nothing is guessed
        pass


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quest:guess=step", "'layer' or none"),
        ("freekv:guess=layer", "'step' or none"),
        ("quest:guess=layer,mass=0.1", "mass=0.1 chooses otherwise"),
        ("leoam:guess=layer,top=9", "top=9 chooses otherwise"),
    ],
)
def test_guesses_that_cannot_be_are_refused(recipe: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        kvpress.attach(tiered.model(), recipe)


def test_guesses_are_turned_as_the_stored_keys_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys are stored turned, a plain query would choose pages in another basis."""
    model = helpers.sharp("llama", head_dim=16)
    asked: list[Tensor] = []
    monkeypatch.setattr(retrieve, "guess", lambda state, query: asked.append(query))
    found = {}
    for rotate in ("none", "both"):
        asked.clear()
        recipe = f"quest:dense=0,read=160,{LAYER}+quant:key_bits=16,value_bits=16,rotate={rotate}"
        run(model, recipe, new=1, device="512KiB", host="64MiB")
        found[rotate] = list(asked)
    # Of the second layer, which the first one has not read any page for.
    assert len(found["none"]) == len(found["both"]) > 0
    torch.testing.assert_close(found["both"][0], turned(found["none"][0]))
