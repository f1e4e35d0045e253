"""The batcher as its callers see it: handles, threads, limits, and how it ends."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import schedules
import torch

import kvpress
from kvpress.batching.batcher import Batcher
from kvpress.batching.handle import Event, Handle
from kvpress.batching.stepper import Stepper
from kvpress.errors import (
    BudgetError,
    InputError,
    RefusedError,
    ServingError,
    TooLargeError,
    UnsupportedModelError,
)

IDS = list(range(3, 60))


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    with Batcher(
        schedules.model(), "h2o:budget=0.5", tokenizer=helpers.characters(), chunk=48
    ) as made:
        yield made


def expected(new: int, ids: list[int] = IDS) -> list[int]:
    with kvpress.attach(schedules.model(), "h2o:budget=0.5") as engine:
        request = kvpress.batching.request.Request(tuple(ids), new)
        return schedules.alone(engine, request)[0]


def test_tokens_come_one_by_one_and_all_in_the_end(batcher: Batcher) -> None:
    handle = batcher.submit(torch.tensor([IDS]), max_new_tokens=12)
    tokens = list(handle)
    done = handle.result(10)
    assert tokens == list(done.tokens) == expected(12)
    assert (done.reason, done.usage.completion_tokens, done.usage.prompt_tokens) == (
        "length",
        12,
        len(IDS),
    )
    assert 0 < done.usage.slots_kept < done.usage.slots_full
    assert 0 < done.usage.bytes_held <= done.usage.bytes_peak
    times = (done.usage.queue_seconds, done.usage.first_token_seconds, done.usage.seconds)
    assert all(x is not None for x in times)
    assert times == tuple(sorted(x for x in times if x is not None))


def test_many_threads_submit_at_once(batcher: Batcher) -> None:
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        handle = batcher.submit(IDS[: 20 + number], max_new_tokens=8, tenant=str(number % 3))
        found[number] = list(handle)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 7, 15):
        assert found[number] == expected(8, IDS[: 20 + number])


def test_coroutines_wait_and_may_be_cancelled(batcher: Batcher) -> None:
    async def both() -> Any:
        first = batcher.submit(IDS, max_new_tokens=6)
        second = batcher.submit(IDS, max_new_tokens=900)
        done = await first.wait()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(second.wait(), 0.2)
        return done, second

    done, second = asyncio.run(both())
    assert list(done.tokens) == expected(6)
    assert second.result(20).reason == "cancelled"
    assert wait_for(lambda: batcher.stats().bytes_held == batcher.stats().bytes_prefixes)


def test_listeners_hear_everything_once_and_one_that_raises_no_more(batcher: Batcher) -> None:
    heard: list[Event] = []
    calls: list[Event] = []

    def fails(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("left")

    handle = batcher.submit(IDS, max_new_tokens=9)
    handle.listen(fails)
    handle.result(20)
    handle.listen(heard.append)
    assert len(calls) <= 2
    assert [x.token for event in heard for x in event.drawn] == expected(9)
    assert [event.ends for event in heard] == [False, True]


def test_ends_stop_texts_and_logprobs(batcher: Batcher) -> None:
    tokens = expected(12)
    done = batcher.submit(IDS, max_new_tokens=12, ends=[tokens[4]]).result(20)
    assert (done.reason, list(done.tokens)) == ("stop", tokens[: tokens.index(tokens[4]) + 1])
    text = helpers.characters().decode(tokens)
    done = batcher.submit(IDS, max_new_tokens=12, stop=text[3:5]).result(20)
    last = text.index(text[3:5]) + 2
    assert (done.reason, list(done.tokens)) == ("stop", tokens[:last])
    handle = batcher.submit(IDS, max_new_tokens=3, sampling=kvpress.Sampling(logprobs=2))
    handle.result(20)
    for drawn in handle.drawn:
        assert drawn.logprob is not None and drawn.logprob <= 0
        assert drawn.top[0] == (drawn.token, pytest.approx(drawn.logprob))
        assert len(drawn.top) == 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ids": []}, InputError, "at least one token id"),
        ({"ids": "text"}, InputError, "tokenizer"),
        ({"ids": [10**6]}, InputError, "no id of this model: 0 to"),
        ({"ids": [1.5]}, InputError, "whole numbers"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, InputError, "one by one"),
        ({"max_new_tokens": 0}, InputError, "at least 1"),
        ({"max_new_tokens": 10**9}, TooLargeError, "allowed are"),
        ({"budget": 0}, BudgetError, "out of range"),
        ({"budget": "much"}, BudgetError, "cannot be read"),
        ({"timeout": -1}, InputError, "seconds above 0"),
        ({"stop": [""]}, InputError, "at least one character"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], error: type[Exception], says: str, batcher: Batcher
) -> None:
    given = {"ids": IDS, "max_new_tokens": 4, **options}
    with pytest.raises(error, match=says):
        batcher.submit(given.pop("ids"), **given)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 2}, {"logprobs": 99}])
def test_samplings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"is not allowed\. Allowed: "):
        kvpress.Sampling(**options)


@pytest.mark.parametrize(
    "options", [{"chunk": 0}, {"most_running": 0}, {"share_prefixes": "some"}, {"most_waiting": 0}]
)
def test_batchers_out_of_range_leave_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = schedules.model()
    before = model.config._attn_implementation
    with pytest.raises(InputError):
        Batcher(model, "full", **options)
    assert model.config._attn_implementation == before


def test_a_generation_config_that_is_not_honoured_is_refused() -> None:
    model = schedules.model()
    model.generation_config.sequence_bias = [[[5], 3.0]]
    with pytest.raises(UnsupportedModelError, match="asks for sequence_bias"):
        Batcher(model, "full")


def test_a_queue_that_is_full_says_when_to_come_again() -> None:
    with Batcher(schedules.model(), "full", most_running=1, most_waiting=2) as own:
        handles, refused = [], None
        for _ in range(8):
            try:
                handles.append(own.submit(IDS, max_new_tokens=400))
            except RefusedError as error:
                refused = error
        assert refused is not None and 1 <= refused.retry_after <= 60
        assert own.stats().refused > 0
        for handle in handles:
            handle.cancel()
        assert {handle.result(20).reason for handle in handles} == {"cancelled"}


def test_requests_that_could_never_fit_are_refused_at_once() -> None:
    with Batcher(schedules.model(), "full", device="40KB", chunk=32) as own:
        with pytest.raises(TooLargeError, match="device= allows 40,000"):
            own.submit(IDS, max_new_tokens=400)
        assert own.submit(IDS[:4], max_new_tokens=2).result(20).tokens


def test_who_rested_long_is_not_taken_for_stuck() -> None:
    with Batcher(schedules.model(), "full") as own:
        own.submit(IDS, max_new_tokens=2).result(20)
        assert own.drain(20)
        own._stepper.counts.last_step_at -= 1000
        own._loop.wake()
        assert wait_for(lambda: time.monotonic() - own._stepper.counts.last_step_at < 100)


def test_draining_ends_what_runs_and_takes_nobody() -> None:
    with Batcher(schedules.model(), "full") as own:
        handle = own.submit(IDS, max_new_tokens=20)
        assert own.drain(30)
        assert len(handle.result(0).tokens) == 20
        with pytest.raises(ServingError, match="takes no more"):
            own.submit(IDS, max_new_tokens=2)


def test_closing_fails_what_runs_and_detaches() -> None:
    model = schedules.model()
    own = Batcher(model, "full")
    handle = own.submit(IDS, max_new_tokens=900)
    next(iter(handle))
    own.close()
    own.close()
    with pytest.raises(ServingError, match="was closed"):
        handle.result(0)
    assert kvpress.engine_of(model) is None
    with pytest.raises(ServingError):
        own.submit(IDS, max_new_tokens=2)


def test_a_batcher_that_died_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Batcher(schedules.model(), "full")
    handle = own.submit(IDS, max_new_tokens=900)
    next(iter(handle))

    def breaks() -> None:
        raise MemoryError("gone")

    monkeypatch.setattr(Stepper, "_admit", lambda stepper: breaks())
    with pytest.raises(ServingError, match="gone"):
        handle.result(20)
    assert wait_for(lambda: not own.stats().alive)
    with pytest.raises(ServingError, match="has stopped"):
        own.submit(IDS, max_new_tokens=2)
    own.close()


def test_a_tenant_that_floods_delays_itself_alone() -> None:
    with Batcher(schedules.model(), "full", most_running=1) as own:
        first = own.submit(IDS, max_new_tokens=30)
        ended: list[str] = []
        for tenant in ["a"] * 6 + ["b"]:
            handle = own.submit(IDS, max_new_tokens=5, tenant=tenant)
            listen(handle, ended, tenant)
        urgent = own.submit(IDS, max_new_tokens=5, tenant="a", priority=1)
        listen(urgent, ended, "urgent")
        first.result(30)
        assert wait_for(lambda: len(ended) == 8)
    assert ended.index("b") <= 2
    assert ended.index("urgent") <= 1


def listen(handle: Handle, ended: list[str], name: str) -> None:
    handle.listen(lambda event: ended.append(name) if event.ends else None)


def test_figures_are_told_as_they_are_measured() -> None:
    told: list[str] = []

    def fails(name: str, value: float) -> None:
        raise RuntimeError("no luck")

    with Batcher(schedules.model(), "full", chunk=16) as own:
        own.observe(fails)  # which ends nothing
        own.observe(lambda name, value: told.append(name))
        ids = random.Random(0).choices(range(3, helpers.VOCAB), k=40)
        own.submit(ids, max_new_tokens=4).result(20)
        stats = own.stats()
    assert set(told) == {
        "step_seconds",
        "step_tokens",
        "queue_seconds",
        "first_token_seconds",
        "token_seconds",
    }
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished) == (40, 4, 1)
    assert stats.running == stats.waiting == 0 and stats.bytes_capacity is None


def wait_for(met: Any, seconds: float = 20) -> bool:
    """Whether a condition is met within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if met():
            return True
        time.sleep(0.01)
    return False
