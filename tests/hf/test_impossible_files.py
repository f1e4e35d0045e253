"""Cache files with a right checksum and impossible contents: refused, or without any effect."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import CacheFileError
from kvpress.store import sealed

# Positions, masses, shared budgets, old slots with and without holes, wide rows, queries that
# are still watched, and those that scores are shown.
RECIPES = {
    "full": "full",
    "h2o": "h2o:budget=0.4",
    "interval": "streaming_llm:budget=24,sink=2,interval=5",
    "d2o": "d2o:budget=0.4",
    "packed": "h2o:budget=0.7+quant:residual=8",
    "ordered": "think:keep=0.5,recent=8+quant:residual=8",
    "wide": "quant:key_bits=2,value_bits=2,guard=0.3,residual=8",
    "watched": "think:keep=0.5,recent=4096",
    "recalled": "r_kv:budget=24,recent=4,interval=5",
}
CASES = 120  # of each recipe
STEPS = helpers.prompt(2, 8, seed=3).split(1, dim=1)

Facts, Tensors = dict[str, Any], dict[str, torch.Tensor]
Edit = Callable[[Facts, Tensors], Any]
ODD = (
    *(None, -1, 0, 1.5, True, "", "a word", [], {}, [[]]),
    *(2**31, 2**53, 2**63, -(2**63), 10**30, math.nan, math.inf, -math.inf),
)


def edits_of_facts(facts: Facts) -> Iterator[tuple[str, Edit]]:
    """Every number, text and list of the header becomes everything that it cannot be."""
    places: list[tuple[str, ...]] = [("settings",), ("layers",)]
    places += [("settings", name) for name in facts["settings"]]
    for number, layer in enumerate(facts["layers"]):
        places += [("layers", number), *(("layers", number, name) for name in layer)]
        places += [("layers", number, "logits", i) for i in range(2)]
    for *path, last in places:
        for odd in (*ODD, "missing", "more"):

            def edit(facts: Facts, _: Tensors, path: Any = path, last: Any = last, odd: Any = odd):
                node = facts
                for name in path:
                    node = node[name]
                if odd == "missing":
                    node.pop(last)
                elif odd == "more":
                    node.update(other=1) if isinstance(node, dict) else node.append(1)
                else:
                    node[last] = odd

            yield f"{'.'.join(map(str, (*path, last)))}: {odd!r}", edit


def reshaped(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same numbers, or nearly, in shapes that they cannot have."""
    yield from (x.flatten(), x[None], x[..., None], x.flatten()[:0], x.new_zeros(()))
    for axis in range(x.dim()):
        yield torch.cat([x, x], dim=axis)
        if x.shape[axis]:
            yield x.narrow(axis, 0, x.shape[axis] - 1)
            yield x.narrow(axis, 0, 0)
    if x.dim() > 1 and x.shape[-1] != x.shape[-2]:
        yield x.mT


def renumbered(name: str, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Numbers that cannot be, in one place or in all."""
    given = ("page.key", "page.value", "page.page", "mass", "threshold_B", "demand_B", "ids")
    if name.endswith(given) or "watched" in name or "recalled" in name or not x.numel():
        return  # any number is one that a model can give, NaN as well
    if x.dtype == torch.bool:
        odd: list[Any] = []
    elif x.is_floating_point():
        odd = [math.nan, -math.inf, -1]
    else:
        odd = [-1, -2, torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max]
    for value in odd:
        yield torch.full_like(x, value)
        one = x.clone()
        one.view(-1)[random.randrange(x.numel())] = value
        yield one
    if name.endswith(("counts", "owned", "table", "dropped")):
        one = x.clone()
        fewer = [] if name.endswith("counts") else [-1]  # a row may have lost one more token
        one.view(-1)[random.randrange(x.numel())] += random.choice([*fewer, 1])
        yield one
    if name.endswith("position"):
        one = x.clone()
        place = random.randrange(1, x.numel())
        one.view(-1)[place] = x.view(-1)[place - 1]
        yield one


def edits_of_tensors(tensors: Tensors) -> Iterator[tuple[str, Edit]]:
    """Tensors are missing, too many, of other types and shapes, and hold absurd numbers."""

    def put(name: str, value: torch.Tensor | None) -> tuple[str, Edit]:
        def edit(_: Facts, tensors: Tensors) -> None:
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value.contiguous()

        return f"{name}: {value}", edit

    dtypes = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
    for name, x in tensors.items():
        yield put(name, None)
        for other in ("9.counts", "0.more", "0.old7.counts", "0.watched.9", "0.watched.x", "more"):
            yield put(other, x)
        yield from (put(name, x.to(dtype)) for dtype in dtypes if dtype != x.dtype)
        yield from (put(name, changed) for changed in reshaped(x))
        yield from (put(name, changed) for changed in renumbered(name, x))


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, list[torch.Tensor]]:
    """An engine, a file of a cache, and the logits with which that cache goes on."""
    model = helpers.tiny(num_hidden_layers=2)
    engine = kvpress.attach(model, RECIPES[request.param], page_size=8)
    ids, mask = helpers.padded([90, 71], "left")
    with torch.no_grad():
        cache = engine.new_cache(max_new_tokens=20)
        model(ids, attention_mask=mask, past_key_values=cache)
        for step in STEPS[:3]:
            model(step, past_key_values=cache)
        cache.save(tmp_path / "cache")
    return engine, tmp_path / "cache", goes_on(engine, cache)


@torch.no_grad()
def goes_on(engine: Any, cache: Any) -> list[torch.Tensor]:
    return [engine.model(step, past_key_values=cache).logits for step in STEPS]


@pytest.mark.parametrize("saved", RECIPES, indirect=True)
def test_impossible_contents_are_refused_or_change_nothing(
    saved: tuple[Any, Path, list[torch.Tensor]],
) -> None:
    engine, file, expected = saved
    contents, other = sealed.read(file), file.with_name("other")
    random.seed(4)
    edits = [*edits_of_facts(contents.facts), *edits_of_tensors(contents.tensors)]
    assert len(edits) > CASES
    loaded, before = 0, engine.cache
    for what, edit in random.sample(edits, CASES):
        facts, tensors = copy.deepcopy(contents)
        edit(facts, tensors)
        sealed.write(other, tensors, facts)
        try:
            cache = engine.load_cache(other)
        except CacheFileError:
            assert engine.cache is before
            continue
        loaded, before = loaded + 1, cache
        same = all(map(torch.equal, goes_on(engine, cache), expected))
        assert same, what
    assert loaded < CASES // 4


@pytest.mark.parametrize("saved", ["packed"], indirect=True)
def test_a_file_that_is_refused_leaves_a_cache_as_it_was(
    saved: tuple[Any, Path, list[torch.Tensor]],
) -> None:
    """Also where the last layer is what cannot be."""
    from kvpress.hf.cache_file import layer_devices

    engine, file, expected = saved
    contents, cache = sealed.read(file), engine.load_cache(file)
    contents.tensors["1.seen_B"] += 1
    sealed.write(file.with_name("other"), contents.tensors, contents.facts)
    with pytest.raises(CacheFileError, match=r"other has a right checksum, but .*Nothing was load"):
        cache.load(file.with_name("other"), layer_devices(engine.model))
    assert all(map(torch.equal, goes_on(engine, cache), expected))
