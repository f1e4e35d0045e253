"""Whatever joins or leaves meanwhile, a request gets what `generate()` alone would give it."""

from __future__ import annotations

import gc
import random
from typing import Any

import helpers
import pytest
import schedules
import torch
from schedules import CHUNK
from session_memory import resident

import kvpress
from kvpress import ops
from kvpress.batching.request import Request, Sampling
from kvpress.batching.stepper import Pace, Stepper
from kvpress.batching.text import Text
from kvpress.errors import DeadlineError, ServingError
from kvpress.hf.cache import EngineCache
from kvpress.hf.feeding import Feeding

RECIPES = {
    **helpers.recipes(),
    "full": "full",
    "keyformer": "keyformer:budget=0.4",
    "packed": "snapkv:budget=0.5,window=8+quant:residual=16",
    "retrieval": "quest:dense=0,read=96",
}


# Keys of equal tokens in the first layer have one norm, up to how a product of so many rows rounds.
TIES = {"knorm"}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[int]]]:
    """The positions that caches hold in the end, by the number of their request."""
    found: dict[int, list[list[int]]] = {}
    end = Text.end

    def noted(text: Text, reason: str) -> None:
        if reason != "cancelled":
            found[text.handle.number] = schedules.positions(text.cache)
        end(text, reason)

    monkeypatch.setattr(Text, "end", noted)
    return found


@pytest.mark.parametrize(("name", "seed"), [(name, i % 4) for i, name in enumerate(RECIPES)])
def test_tokens_and_slots_are_those_of_generate_alone(
    name: str, seed: int, kept: dict[int, list[list[int]]]
) -> None:
    model = schedules.model()
    with kvpress.attach(model, RECIPES[name], tokenizer=helpers.characters()) as engine:
        planned = schedules.schedule(seed)
        expected = [schedules.alone(engine, one.request) for one in planned]
        schedules.run(schedules.made(engine), planned)
    for number, (one, (tokens, positions)) in enumerate(zip(planned, expected, strict=True)):
        assert one.handle is not None
        completion = one.handle.result(0)
        if completion.reason == "cancelled":
            assert one.leaves is not None
            assert list(completion.tokens) == tokens[: len(completion.tokens)]
        else:
            assert list(completion.tokens) == tokens, f"request {number}"
            same = [len(row) for row in kept[number]] == [len(row) for row in positions]
            assert same if name in TIES else kept[number] == positions, f"request {number}"


@pytest.mark.parametrize("recipe", ["full", "h2o:budget=0.5", "snapkv:budget=0.3+quant"])
def test_how_much_is_done_at_once_changes_no_token(recipe: str) -> None:
    model = schedules.model()
    found = []
    for pace in (Pace(CHUNK, 1, 2), Pace(CHUNK, 10_000, 64), Pace(CHUNK, CHUNK, 5)):
        with kvpress.attach(model, recipe) as engine:
            planned = schedules.schedule(7)
            for one in planned:
                one.leaves = None
            schedules.run(schedules.made(engine, pace), planned, steps=2000)
        found.append([one.handle.result(0).tokens for one in planned if one.handle])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_held_is_foreseen_where_prefixes_are_shared(name: str) -> None:
    def check(own: Stepper) -> None:
        for text in own.running:
            assert text.cache.nbytes <= text.reserved
        known = own.prefixes._known.values()
        assert sum(x.cache.nbytes for x in known) == own.prefixes.nbytes

    with kvpress.attach(schedules.model(), RECIPES[name], tokenizer=helpers.characters()) as engine:
        own = schedules.made(engine, caps=10**7)
        schedules.run(own, schedules.schedule(1, 10), check, 2000)
        deferred = engine.spec.recipe.defers
    assert deferred or own.stepper.counts.cached_tokens > 0


@pytest.mark.parametrize("name", ["full", "h2o", "keyformer", "packed", "d2o", "adakv"])
def test_what_is_held_is_foreseen_and_below_the_cap(name: str) -> None:
    model = schedules.model()
    cap = 160_000
    most: list[int] = []

    def check(own: Stepper) -> None:
        for text in own.running:
            assert text.cache.nbytes <= text.reserved
        assert own.nbytes <= own.reserving.promised <= cap
        most.append(len(own.running))
        for text in own.running:
            text.cache.check_integrity()

    with kvpress.attach(model, RECIPES[name]) as engine:
        own = schedules.made(engine, caps=cap)
        schedules.run(own, schedules.schedule(3, 14), check, 2000)
        assert own.stepper.prefixes.nbytes + own.stepper.reserving.promised > 0
        while own.stepper.prefixes.drop():
            pass
        assert own.stepper.nbytes == 0
        idle = schedules.made(engine, caps=cap).stepper.reserving.promised
        assert own.stepper.reserving.promised == idle
    assert max(most) > 1


def test_more_requests_fit_where_less_is_kept() -> None:
    most = {}
    for recipe in ("full", "streaming_llm:budget=0.25,sink=2"):
        running: list[int] = []
        with kvpress.attach(schedules.model(), recipe) as engine:
            ids = tuple(random.Random(0).choices(range(3, helpers.VOCAB), k=400))
            planned = [schedules.Planned(Request(ids, 8), 0) for _ in range(24)]
            own = schedules.made(engine, Pace(CHUNK, 10_000, 64), 800_000)
            schedules.run(own, planned, lambda x, r=running: r.append(len(x.running)))
        most[recipe] = max(running)
    full, evicting = most.values()
    assert evicting >= 3 * full > 0


@pytest.mark.parametrize("family", ["gemma3", "bloom", "opt", "gpt2", "deepseek_v3", "gpt_oss"])
def test_other_families(family: str, kept: dict[int, list[list[int]]]) -> None:
    model = schedules.model(family)
    with kvpress.attach(model, "snapkv:budget=0.5,window=8") as engine:
        planned = schedules.schedule(5, 5, 90)
        expected = [schedules.alone(engine, one.request) for one in planned]
        schedules.run(schedules.made(engine), planned)
    for number, (one, (tokens, positions)) in enumerate(zip(planned, expected, strict=True)):
        assert one.handle is not None
        completion = one.handle.result(0)
        if completion.reason != "cancelled":
            assert list(completion.tokens) == tokens
            assert kept[number] == positions


def test_prefixes_are_read_once() -> None:
    with kvpress.attach(schedules.model(), "h2o:budget=0.5") as engine:
        draw = random.Random(1)
        common = [draw.randrange(3, helpers.VOCAB) for _ in range(2 * CHUNK)]
        texts = [(*common, *(draw.randrange(3, helpers.VOCAB) for _ in range(9))) for _ in range(4)]
        planned = [schedules.Planned(Request(ids, 6), 4 * i) for i, ids in enumerate(texts)]
        expected = [schedules.alone(engine, one.request)[0] for one in planned]
        own = schedules.made(engine)
        schedules.run(own, planned)
    handles = [one.handle for one in planned if one.handle]
    assert [list(x.result(0).tokens) for x in handles] == expected
    # The first is met, a copy of the second kept, from which the others go on.
    assert [x.usage.cached_tokens for x in handles] == [0, 0, 2 * CHUNK, 2 * CHUNK]
    assert own.stepper.counts.prompt_tokens == sum(map(len, texts)) - 4 * CHUNK


def test_prefixes_of_tenants_and_budgets_are_their_own() -> None:
    with kvpress.attach(schedules.model(), "h2o:budget=0.5") as engine:
        ids = tuple(random.Random(1).choices(range(3, helpers.VOCAB), k=3 * CHUNK))
        kinds = [("a", None), ("b", None), ("a", 0.25), ("a", None)]
        requests = [Request(ids, 2, tenant=x, budget=budget) for x, budget in kinds]
        planned = [schedules.Planned(x, 3 * i) for i, x in enumerate(requests)]
        schedules.run(schedules.made(engine), planned)
    assert [one.handle.usage.cached_tokens for one in planned if one.handle] == [0, 0, 0, 0]


def test_a_budget_of_its_own() -> None:
    model = schedules.model()
    request = Request(tuple(range(3, 90)), 12, budget=0.25)
    with kvpress.attach(model, "h2o:budget=0.25") as engine:
        expected, _ = schedules.alone(engine, request)
    with kvpress.attach(model, "h2o:budget=0.75") as engine:
        planned = [schedules.Planned(request, 0), schedules.Planned(Request(request.ids, 12), 0)]
        schedules.run(schedules.made(engine), planned)
    own, others = (one.handle.result(0) for one in planned if one.handle)
    assert list(own.tokens) == expected
    assert own.usage.slots_kept < others.usage.slots_kept < others.usage.slots_full


@pytest.mark.parametrize("error", [RuntimeError("no luck"), None])
def test_who_fails_fails_alone(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = schedules.model()
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        planned = schedules.schedule(11, 4)
        for one in planned:
            one.leaves, one.comes = None, 0
        requests = [Request(one.request.ids, 15) for one in planned]
        planned = [schedules.Planned(request, 0) for request in requests]
        expected = [schedules.alone(engine, request)[0] for request in requests]
        own = schedules.made(engine)
        seen = 0

        def harm(stepper: Stepper) -> None:
            nonlocal seen
            seen += 1
            if seen == 6:
                spoil(stepper.running[1].cache, error, monkeypatch)

        schedules.run(own, planned, harm)
    handles = [one.handle for one in planned if one.handle]
    with pytest.raises(RuntimeError if error else ServingError, match=r"no luck|NaN"):
        handles[1].result(0)
    for number in (0, 2, 3):
        assert list(handles[number].result(0).tokens) == expected[number]
    assert own.stepper.counts.failed == 1


def test_a_prompt_whose_logits_are_no_numbers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = schedules.model()
    with kvpress.attach(model, "full") as engine:
        with torch.no_grad():
            model.get_input_embeddings().weight[5] = torch.nan
        planned = [schedules.Planned(Request((3, 4, x), 3), 0) for x in (6, 5)]
        schedules.run(schedules.made(engine), planned)
    good, bad = (one.handle for one in planned if one.handle)
    assert len(good.result(0).tokens) == 3
    with pytest.raises(ServingError, match="NaN"):
        bad.result(0)
    assert not bad.drawn


def test_a_pass_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with kvpress.attach(schedules.model(), "full") as engine:
        own = schedules.made(engine)
        own.stepper.counts.listeners.append(lambda name, value: told.append(name))
        planned = [schedules.Planned(Request((3, 4, 5), 9), 0) for _ in range(2)]

        def fails(*args: Any) -> None:
            raise RuntimeError("no memory")

        schedules.run(own, planned, lambda x: monkeypatch.setattr(Feeding, "decode", fails))
    for one in planned:
        assert one.handle is not None
        with pytest.raises(ServingError, match="step of 2 requests failed: no memory"):
            one.handle.result(0)
    assert told.count("step_errors") == 1 and own.stepper.nbytes == 0


@pytest.mark.parametrize("recipe", ["full", "h2o:budget=0.5", "keyformer:budget=0.5"])
def test_texts_that_decode_together_take_one_operator_call_per_layer(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, alone = list[int](), list[int]()
    together, single = ops.decode_together, ops.decode_step
    monkeypatch.setattr(
        ops, "decode_together", lambda steps: texts.append(len(steps)) or together(steps)
    )
    monkeypatch.setattr(ops, "decode_step", lambda *x: alone.append(1) or single(*x))
    with kvpress.attach(schedules.model(), recipe) as engine:
        planned = [schedules.Planned(Request(tuple(range(3, 30 + 9 * n)), 6), 0) for n in range(3)]
        schedules.run(schedules.made(engine, Pace(512)), planned)
        layers = len(engine.new_cache().states)
    assert not alone
    assert texts == [3] * layers * 5  # the first of six tokens follows from the prompt


def spoil(cache: EngineCache, error: Exception | None, patch: pytest.MonkeyPatch) -> None:
    """Lets a cache raise in its second layer, or stores values that are no numbers."""
    state = cache.states[1]
    if error is None:
        state.rows.paging.pages("value").fill_(torch.nan)
        return

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    patch.setattr(state, "count_decoded", fails)


def test_late_requests_and_those_whose_callers_left() -> None:
    with kvpress.attach(schedules.model(), "full") as engine:
        own = schedules.made(engine)
        ids = tuple(range(3, 60))
        late = own.desk.handle(0, Request(ids, 500, timeout=1e-9), lambda: None)
        gone = own.desk.handle(1, Request(ids, 500), lambda: None)
        for handle in (late, gone):
            own.stepper.order.add(handle)
        gone.cancel()
        assert not own.stepper.step()
        with pytest.raises(DeadlineError, match="1e-09 seconds"):
            late.result(0)
        assert gone.result(0).reason == "cancelled"
        late = own.desk.handle(2, Request(ids, 500, timeout=60), lambda: None)
        own.stepper.order.add(late)
        own.stepper.step()
        assert own.stepper.nbytes > 0
        late.submitted_at -= 61
        own.stepper.step()
        assert late.done
        assert own.stepper.nbytes == 0


def test_who_is_paused_draws_nothing_and_stops_nobody() -> None:
    with kvpress.attach(schedules.model(), "full") as engine:
        own = schedules.made(engine)
        handles = [
            own.desk.handle(n, Request(tuple(range(3, 30 + n)), 10), lambda: None) for n in range(2)
        ]
        for handle in handles:
            own.stepper.order.add(handle)
        own.stepper.step()
        handles[0].pause()
        before = len(handles[0].drawn)
        while own.stepper.step():
            pass
        assert handles[1].done
        assert len(handles[0].drawn) == before
        handles[0].pause(False)
        while own.stepper.step():
            pass
        assert len(handles[0].result(0).tokens) == 10


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, seed=3),
        Sampling(temperature=1.0, top_k=5, seed=4),
        Sampling(temperature=1.3, top_p=0.7, seed=5),
        Sampling(top_p=0.5, seed=6),
    ],
)
def test_seeded_tokens_are_those_of_generate_alone(sampling: Sampling) -> None:
    with kvpress.attach(schedules.model(), "h2o:budget=0.5") as engine:
        requests = [Request(tuple(range(3, 40 + n)), 12, sampling) for n in range(3)]
        expected = [schedules.alone(engine, request)[0] for request in requests]
        planned = [schedules.Planned(x, 2 * n) for n, x in enumerate(requests)]
        schedules.run(schedules.made(engine), planned)
    assert [list(one.handle.result(0).tokens) for one in planned if one.handle] == expected


def alive() -> int:
    """Caches that hold tokens, in this process."""
    gc.collect()
    return sum(type(x) is EngineCache and bool(x.columns_seen) for x in gc.get_objects())


@pytest.mark.parametrize("requests", [10_000, 500])
def test_requests_leave_nothing(requests: int) -> None:
    before, sizes = alive(), list[int]()
    with kvpress.attach(schedules.model(), "snapkv:budget=24,window=4") as engine:
        own = schedules.made(engine, Pace(CHUNK, 256, 24), 2_000_000)
        draw, number = random.Random(0), 0
        while number < requests:
            for _ in range(draw.randrange(0, 12)):
                ids = tuple(draw.choices(range(3, helpers.VOCAB), k=draw.randrange(1, 40)))
                handle = own.desk.handle(number, Request(ids, draw.randrange(1, 4)), lambda: None)
                own.stepper.order.add(handle)
                number += 1
                if draw.random() < 0.1:
                    handle.cancel()
            own.stepper.step()
            if number > 300:  # everything that is made once was
                sizes.append(resident("VmRSS"))
        while own.stepper.step():
            pass
        assert own.stepper.nbytes == 0
        counts = own.stepper.counts
        assert counts.finished + counts.cancelled == number
    assert alive() <= before
    assert sizes[-1] - sizes[0] < 24 << 20
