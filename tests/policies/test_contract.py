"""What every policy must hold. The list is the folder: a new policy is tested by being there.

Beside them stands the example of CONTRIBUTING.md. No policy is known by name, and none needs more
options than its own.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.hf.cache_layer import EngineLayer
from kvpress.policy.loading import available, load_policy, parse

PROMPT, NEW, BUDGET = 61, 12, 29
WIDE = {"initializer_range": 0.3}
EXAMPLE = "value_norm"
FILES = {EXAMPLE: str(Path(__file__).parents[1] / "tools" / f"{EXAMPLE}.py")}
# Those that divide the budget of others, fit what they leave, or must know a model beforehand, have
# tests of their own.
OTHERS = {
    "adakv",
    "matching",
    *(name for name, cls in available().items() if helpers.must_know(cls())),
}
POLICIES = sorted({*available(), EXAMPLE} - OTHERS)
EMBEDDED = [x for x in POLICIES if x != EXAMPLE and not load_policy(x).overrides("probes")]
EVICTING = [name for name in POLICIES if load_policy(FILES.get(name, name)).limits is not None]


def policy(name: str, **options: Any) -> Any:
    """A policy with protected tokens that fit a small budget, and those options that it knows."""
    usual = load_policy(FILES.get(name, name))
    known = {field.name: field.default for field in dataclasses.fields(usual)}
    # Budgets of layers and rows have tests of their own; these models have no words.
    small: dict[str, Any] = {"layers": "uniform", "scope": "row", "instruction": "", "further": ""}
    if usual.limits is not None:
        if isinstance(known.get("window"), int):
            small["window"] = 8
        if usual.limits.interval > 8:  # more than these texts have
            small["interval"] = 8
        if not usual.limits.interval:  # it is made for prompts alone
            options.pop("interval", None)
    given = {name: value for name, value in (small | options).items() if name in known}
    return load_policy(FILES.get(name, name), **given)


def test_the_example_of_the_guide_is_a_file_that_holds_the_contract() -> None:
    guide = Path(__file__).parents[2] / "CONTRIBUTING.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    file = Path(FILES[EXAMPLE]).read_text(encoding="utf-8")
    assert [textwrap.dedent(block) for block in blocks] == [file]


def run(model: Any, recipe: Any, ids: torch.Tensor, mask: torch.Tensor, new: int = NEW) -> Any:
    """The tokens and the cache after a prompt and `new` decoded tokens."""
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=new)
        return helpers.greedy(model, ids, mask, new, cache), cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [0.5, 17])
@pytest.mark.parametrize("name", POLICIES)
def test_row_in_a_padded_batch_equals_the_row_alone(name: str, budget: Any, side: str) -> None:
    # A token that is generated again and again lies as near to the one before as to the one behind,
    # so that rounding decides what merges: this model's tokens differ. Where a score is of what is
    # stored alone, equal tokens tie.
    recipe = policy(name, budget=budget)
    ties = recipe.overrides("score") and not recipe.overrides("observe")
    model, lengths = helpers.tiny(**{} if ties else WIDE), [PROMPT, 1, 23, 40]
    ids, mask = helpers.padded(lengths, side)
    together, cache = run(model, recipe, ids, mask)
    assert cache.check_integrity()
    for row in range(len(lengths)):
        alone = ids[row : row + 1][:, mask[row].bool()]
        expected, own = run(model, recipe, alone, torch.ones_like(alone))
        assert torch.equal(together[row : row + 1], expected), f"tokens of row {row}"
        text = [*alone[0].tolist(), *expected[0].tolist()] if ties else range(PROMPT + NEW)
        for ours, theirs in zip(helpers.positions(cache, row), helpers.positions(own), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert sorted(text[p] for p in a) == sorted(text[p] for p in b), f"row {row}"


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("budget", [0.5, 0.29, "0.5prompt", BUDGET, 1.0])
@pytest.mark.parametrize("name", EVICTING)
def test_kept_counts_equal_the_budget_after_prompt_and_decode(
    name: str, budget: Any, interval: int
) -> None:
    recipe = policy(name, budget=budget, interval=interval)
    steps = recipe.limits.interval
    ids = helpers.prompt(2, PROMPT)
    for new in (1, NEW):
        _, cache = run(helpers.tiny(), recipe, ids, torch.ones_like(ids), new)
        decoded = new - 1
        grown = decoded % steps if steps and budget != 1.0 else decoded
        seen = PROMPT + (decoded - grown if steps else 0)  # when rows were last at their quotas
        fractions = {0.5: seen // 2, 0.29: 29 * seen // 100, 1.0: PROMPT}
        kept = {**fractions, "0.5prompt": PROMPT // 2, BUDGET: BUDGET}[budget]
        for state in cache.states:
            assert state.store.counts_BH.tolist() == [[kept + grown] * 2] * 2
        for row in (row for heads in helpers.positions(cache) for row in heads):
            assert all(a < b for a, b in pairwise(row))
            free = not recipe.limits.recent and not recipe.limits.recent_ratio
            assert row[-1] == PROMPT + decoded - 1 or free
        assert cache.check_integrity()


@pytest.mark.parametrize("recipe", [*EMBEDDED, "h2o+quant", "knorm+think", "sale+tova"])
@torch.no_grad()
def test_a_row_that_is_not_finite_leaves_the_others_alone(recipe: str) -> None:
    model, ids = helpers.tiny(**WIDE), helpers.prompt(3, PROMPT)
    embeds = model.get_input_embeddings()(ids)
    embeds[1, 20] = torch.nan
    alone, caches = [], []
    with kvpress.attach(model, recipe) as engine:
        for rows in ([0, 1, 2], [0], [2]):
            cache = engine.new_cache(max_new_tokens=NEW)
            logits = [model(inputs_embeds=embeds[rows], past_key_values=cache).logits[:, -1]]
            for step in range(NEW):
                token = helpers.prompt(3, NEW, seed=1)[rows, step : step + 1]
                logits.append(model(token, past_key_values=cache).logits[:, -1])
            alone.append(torch.stack(logits, 1))
            caches.append(cache)
            assert cache.check_integrity()
    together, first, last = alone
    assert together[1].isnan().any()
    torch.testing.assert_close(together[[0, 2]], torch.cat([first, last]), rtol=1e-3, atol=1e-3)
    for row, cache in ((0, caches[1]), (2, caches[2])):
        assert helpers.positions(caches[0], row) == helpers.positions(cache)
    counts = caches[0].report().slots_kept
    divides = parse(recipe).stage("share").overrides("share")
    assert all(layer[1] == layer[0] for layer in counts) or divides
    notes = " ".join(caches[0].report().notes)
    ranked = recipe.split("+")[-1] in ("h2o", "keyformer", "knorm", "snapkv", "tova", "d2o")
    assert ("Sequence 1 is not finite in layer 0, KV heads [0, 1]" in notes) or not ranked
    assert "Sequence 0" not in notes and "Sequence 2" not in notes


@pytest.mark.parametrize("name", EVICTING)
def test_protected_tokens_survive(name: str) -> None:
    recipe = policy(name, budget=BUDGET, sink=3, recent=7)
    ids = helpers.prompt(1, PROMPT)
    _, cache = run(helpers.tiny(), recipe, ids, torch.ones_like(ids))
    seen = PROMPT + NEW - 1
    recent = recipe.limits.recent or 0
    last = seen if recipe.limits.interval else PROMPT  # without decode eviction all later ones stay
    for row in (row for heads in helpers.positions(cache) for row in heads):
        assert set(range(recipe.limits.sink)) <= set(row)
        assert set(range(last - recent, seen)) <= set(row)


@pytest.mark.parametrize("name", POLICIES)
def test_kept_keys_and_values_are_bit_identical_to_the_originals(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, PROMPT)
    originals = []
    update = EngineLayer.update

    def spy(
        layer: EngineLayer, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        originals.append({"key": key.clone(), "value": value.clone()})
        return update(layer, key, value, *args, **kw)

    monkeypatch.setattr(EngineLayer, "update", spy)
    # Where something could be merged, pruned or packed, nothing is.
    whole = {"threshold": 2.0, "keep": 1.0, "key_bits": 16, "value_bits": 16}
    recipe = policy(name, budget=0.5, **whole)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    read = originals[: len(cache.states)]  # by probes more, which are forgotten
    for original, state in zip(read, cache.states, strict=True):
        position = state.store.dense("position").long()
        index = position[..., None].expand(*position.shape, 16)
        for column, given in original.items():
            assert torch.equal(state.store.dense(column), given.gather(2, index))
        assert position.shape[2] == (PROMPT // 2 if name in EVICTING else PROMPT)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_shorter_than_the_protected_tokens_works(name: str, tokens: int) -> None:
    recipe = policy(name, budget=0.5, sink=4, recent=9)
    ids = helpers.prompt(1, tokens)
    given, cache = run(helpers.tiny(), recipe, ids, torch.ones_like(ids), 6)
    assert given.shape == (1, 6)
    assert cache.check_integrity()
    assert cache.report().tokens_seen == [tokens + 5]


@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_that_evicts_nothing_changes_nothing(name: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 20)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with kvpress.attach(model, policy(name, budget=1.0)) as engine:
        assert torch.equal(engine.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert any("nothing was evicted" in note for note in engine.report().notes)
    with kvpress.attach(model, policy(name, budget=200)) as engine:
        assert torch.equal(engine.generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("name", EVICTING)
def test_byte_budgets_are_met_in_bytes(name: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, PROMPT)
    with kvpress.attach(model, policy(name, budget="48KiB"), page_size=4) as engine:
        engine.generate(ids, max_new_tokens=8, do_sample=False)
        report = engine.report()
    pools = sum(p.nbytes for s in engine.cache.states for p in s.store.paging.pool.tensors())
    if engine.recipe.limits.interval:
        assert 0.7 * 2 * 48 * 1024 < pools <= 2 * 48 * 1024
    assert len({slots for layer in report.slots_kept for row in layer for slots in row}) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_run_twice_is_the_same(name: str) -> None:
    ids = helpers.prompt(1, PROMPT)
    runs = [
        run(helpers.tiny(), policy(name, budget=0.5), ids, torch.ones_like(ids)) for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert helpers.positions(runs[0][1]) == helpers.positions(runs[1][1])


@pytest.mark.parametrize("name", EVICTING)
def test_a_second_prompt_chunk_is_compressed_with_the_first(name: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, PROMPT)
    with kvpress.attach(model, policy(name, budget=0.5)) as engine, torch.no_grad():
        cache = engine.new_cache()
        for chunk in ids.split([30, 31], dim=1):
            model(chunk, past_key_values=cache)
        assert cache.report().slots_kept == [[[PROMPT // 2] * 2]] * 3
        assert cache.check_integrity()


@pytest.mark.parametrize("name", EVICTING)
def test_sliding_layers_keep_their_window_and_say_so(name: str) -> None:
    model, ids = helpers.tiny("gemma3"), helpers.prompt(1, PROMPT)
    with kvpress.attach(model, policy(name, budget=0.5)) as engine:
        engine.generate(ids, max_new_tokens=1, do_sample=False)
        report = engine.report()
    assert [layer.kind for layer in report.layers] == ["sliding", "full", "sliding"]
    assert report.slots_kept == [[[8] * 2], [[30] * 2], [[8] * 2]]
    assert any("sliding-window" in note for note in report.notes)
