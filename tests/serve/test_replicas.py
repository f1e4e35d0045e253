"""Replicas on Ray itself: processes that serve, die and come back, with a tiny model each."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
from kvpress.bench.common.models import Source
from serving import chat, events, eventually, serving, tiny_tokenizer
from typer.testing import CliRunner

import kvpress
from kvpress.batching.request import Sampling
from kvpress.cli import app
from kvpress.errors import BudgetError, InputError, KVPressError, ServingError, TooLargeError
from kvpress.serve.replicas import making
from kvpress.serve.replicas.cluster import Cluster, cpus_each
from kvpress.serve.replicas.fleet import Fleet
from kvpress.serve.replicas.making import Counts, counts, made_fleet
from kvpress.serve.replicas.plan import Plan

POLICY, OPTIONS = "h2o:budget=0.5", {"device": "16MiB", "chunk": 64}
SLOW = 120.0  # seconds that a busy machine may take to start a process


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="the extra ray is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    patch.delenv("RAY_ADDRESS", raising=False)
    found.init(
        address="local",
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield found
    found.shutdown()
    patch.undo()
    with warnings.catch_warnings():  # Ray leaves what it has started to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose texts end where they are told to."""
    place: Path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = tiny_tokenizer()
    model = helpers.sharp("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def fleet(ray: Any, folder: Path) -> Iterator[Fleet]:
    disk = folder.parent / "disk"
    disk.mkdir()
    options = {**OPTIONS, "host": None, "disk": f"1MiB:{disk}"}
    made, _ = made_fleet(Plan(Source(str(folder), device="cpu"), POLICY, options), Counts(2, 2))
    assert len(list(disk.iterdir())) == 2
    yield made
    made.close()
    assert not list(disk.iterdir())


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[kvpress.Batcher]:
    model, tokenizer = Source(str(folder), device="cpu").load()
    with kvpress.Batcher(model, POLICY, tokenizer=tokenizer, **OPTIONS) as batcher:
        yield batcher


def prompt(number: int, tokens: int) -> list[int]:
    return [(7 * number + place * place) % 250 for place in range(tokens)]


def held(fleet: Fleet) -> int:
    """Bytes of keys and values on all replicas but for prefixes, once each has spoken again."""
    return fleet.stats().bytes_held - fleet.stats().bytes_prefixes


def victim(fleet: Fleet, handle: Any) -> Any:
    """The replica that serves a request."""
    found = fleet._dispatch.tickets[handle.number][1]
    assert found is not None
    return found


def test_answers_are_those_of_a_single_batcher_and_both_replicas_serve(
    fleet: Fleet, alone: kvpress.Batcher
) -> None:
    asked = [
        {"ids": prompt(number, 20 + 30 * number), "max_new_tokens": 12, "sampling": sampling}
        for number in range(4)
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=5, logprobs=2))
    ]
    handles = [fleet.submit(**one) for one in asked]
    served = [one.requests for one in fleet.replicas.each]
    singles = [alone.submit(**one) for one in asked]
    for handle, single in zip(handles, singles, strict=True):
        assert handle.result(SLOW).tokens == single.result(SLOW).tokens
        assert [one.token for one in handle.drawn] == list(handle.result().tokens)
        said = [(len(one.top), one.logprob) for one in handle.drawn]
        assert said == [(len(x.top), pytest.approx(x.logprob, abs=1e-4)) for x in single.drawn]
        assert handle.usage.slots_kept == single.usage.slots_kept
    assert served == [4, 4]
    stats = fleet.stats()
    assert (stats.finished, stats.failed, stats.bytes_promised) == (8, 0, 0)
    assert stats.bytes_capacity == 2 * alone.stats().bytes_capacity  # type: ignore[operator]


def test_a_cancelled_request_frees_its_bytes_on_its_replica(fleet: Fleet) -> None:
    handle = fleet.submit(prompt(1, 300), max_new_tokens=600)
    tokens = iter(handle)
    assert len([next(tokens) for _ in range(3)]) == 3  # they come one by one
    eventually(lambda: held(fleet) > 0, SLOW)
    handle.cancel()
    assert handle.result(SLOW).reason == "cancelled"
    eventually(lambda: held(fleet) == 0, SLOW)


def test_a_prompt_goes_where_its_beginning_was_read(fleet: Fleet) -> None:
    start = prompt(9, 200)
    for number, cached in enumerate((0, 0, 192)):  # kept when it comes a second time
        other = fleet.submit(prompt(number, 30), max_new_tokens=1)
        handle = fleet.submit([*start, number, number], max_new_tokens=2, tenant="a")
        assert handle.result(SLOW).usage.cached_tokens == cached
        other.result(SLOW)


def test_what_is_refused_is_refused_at_once_with_the_class_of_a_batcher(fleet: Fleet) -> None:
    with pytest.raises(TooLargeError):
        fleet.submit([1] * 10, max_new_tokens=10**7)
    with pytest.raises(BudgetError):
        fleet.submit([1], max_new_tokens=2, budget="much")
    with pytest.raises(InputError):
        fleet.submit([10**6], max_new_tokens=2)


def test_of_a_killed_replica_requests_begin_anew_or_end_and_it_comes_back(
    ray: Any, fleet: Fleet, alone: kvpress.Batcher
) -> None:
    begun = [fleet.submit(prompt(number, 40), max_new_tokens=400) for number in range(4)]
    eventually(lambda: all(len(handle.drawn) > 2 for handle in begun), SLOW)
    own = victim(fleet, begun[0])
    mine = [handle for handle in begun if victim(fleet, handle) is own]
    for handle in begun:
        handle.pause()
    news = [fleet.submit(prompt(number, 60), max_new_tokens=4) for number in range(2)]
    ray.kill(own.link._actor)
    for handle in begun:
        handle.pause(False)
    for number, handle in enumerate(begun):
        whole = alone.submit(prompt(number, 40), max_new_tokens=400).result(SLOW).tokens
        if handle in mine:
            with pytest.raises(ServingError, match="was lost"):
                handle.result(SLOW)
            drawn = [one.token for one in handle.drawn]
            assert drawn == list(whole[: len(drawn)])  # none missing, none twice
        else:
            assert handle.result(SLOW).tokens == whole
    for number, handle in enumerate(news):
        single = alone.submit(prompt(number, 60), max_new_tokens=4).result(SLOW)
        assert handle.result(SLOW).tokens == single.tokens
    eventually(lambda: fleet.replicas.alive == 2, SLOW)
    assert fleet.replicas.restarts == 1 and fleet.stats().bytes_promised == 0
    handles = [fleet.submit(prompt(number, 30), max_new_tokens=2) for number in range(2)]
    assert [one.requests for one in fleet.replicas.each] == [1, 1]
    assert all(handle.result(SLOW).tokens for handle in handles)


def test_the_server_over_replicas_on_ray(fleet: Fleet) -> None:
    tokenizer, batcher = tiny_tokenizer(), fleet
    with serving(batcher, tokenizer) as server:  # type: ignore[arg-type]
        whole = server.chat(max_tokens=12).json()["choices"][0]["message"]["content"]
        parts = events(server.chat(max_tokens=12, stream=True).text)
        deltas = [one["choices"][0]["delta"].get("content") or "" for one in parts[:-1]]
        assert "".join(deltas) == whole and parts[-1] == "[DONE]"
        wrong = server.post("/v1/chat/completions", chat(kvpress={"budget": "much"}))
        assert wrong.status_code == 400
        assert server.chat("x" * 3000).status_code == 413
        health = server.get("/health").json()
        assert health["replicas"] == {"alive": 2, "starting": 0}
        assert 'replica="1"' in server.get("/metrics").text
        stream = server.raw(chat(stream=True, max_tokens=900))
        eventually(lambda: fleet.stats().running == 1, SLOW)
        stream.close()
        eventually(lambda: held(fleet) == 0, SLOW)
    # `serving` has closed the fleet: no actor is left, nor a file of one.


def test_a_closed_fleet_leaves_no_actor(ray: Any, fleet: Fleet) -> None:
    fleet.close()
    states = ray._private.state.actors().values()
    assert len(states) >= 2 and {one["State"] for one in states} == {"DEAD"}


def test_a_model_that_cannot_be_loaded_is_said_with_its_own_error(ray: Any, tmp_path: Path) -> None:
    plan = Plan(Source(str(tmp_path / "none"), device="cpu"), POLICY, OPTIONS)
    with pytest.raises(KVPressError, match="cannot be loaded") as error:
        made_fleet(plan, Counts(1, 1))
    assert type(error.value).__name__ == "ModelError"


def test_gpus_are_counted_before_anything_is_loaded(ray: Any) -> None:
    plan = Plan(Source("none", device="cuda"), POLICY, OPTIONS)
    with pytest.raises(ServingError, match="each needs a GPU"):
        made_fleet(plan, Counts(1, 9))
    with pytest.raises(ServingError, match="Give cuda"):
        made_fleet(Plan(Source("none", device="cuda:1"), POLICY, OPTIONS), Counts(1, 1))
    assert Cluster().has("CPU") == 2


def test_cores_are_divided_among_replicas() -> None:
    assert [cpus_each(16, 4, None), cpus_each(16, 3, None), cpus_each(16, 2, 4)] == [4, 5, 4]
    assert [cpus_each(2, 4, None), cpus_each(2, 4, 8), cpus_each(0, 3, None)] == [0.5, 0.5, 0.33]


@pytest.mark.parametrize("text", ["0", "4-2", "many", "1-", "-3", "1.5"])
def test_numbers_of_replicas_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ServingError, match="--replicas"):
        counts(text)


def test_without_ray_or_under_torchrun_it_is_said_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(making, "ray_of", lambda: None)
    assert counts("3") == (3, 3) and counts("1-4") == (1, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ServingError, match="torchrun"):
        counts("2")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServingError, match=r"pip install 'kvpress-engine\[serve,ray\]'"):
        counts("2")
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["serve", "--replicas", "none"])
    assert isinstance(result.exception, ServingError)
