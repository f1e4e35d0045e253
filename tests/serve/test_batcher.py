"""The server over the batcher itself, on a tiny model: nothing here is scripted."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import helpers
import pytest
from serving import Running, chat, events, eventually, serving, tiny_tokenizer
from session_memory import resident

import kvpress
from kvpress.pipe.state.heap import trim


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    model = helpers.sharp("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    batcher: Any = kvpress.Batcher(
        model, "h2o:budget=0.5", tokenizer=tokenizer, device="16MiB", chunk=64, most_waiting=64
    )
    with serving(batcher, tokenizer) as running:
        yield running


def test_many_chats_at_once_get_what_each_gets_alone(real: Running) -> None:
    texts = [f"Tell me about the number {number}, and {'more ' * number}" for number in range(12)]
    alone = [real.chat(text, max_tokens=12).json()["choices"][0] for text in texts]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = real.chat(texts[number], max_tokens=12).json()["choices"][0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(texts))] == alone
    assert len({choice["message"]["content"] for choice in alone}) > 1


def test_streams_seeds_and_stop_texts(real: Running) -> None:
    sampled = {"max_tokens": 16, "temperature": 1.0, "seed": 7}
    whole = real.chat(**sampled).json()["choices"][0]["message"]["content"]
    parts = events(real.chat(**sampled, stream=True).text)
    assert parts[-1] == "[DONE]"
    deltas = [x["choices"][0]["delta"].get("content") or "" for x in parts[:-1]]
    assert (
        "".join(deltas) == whole == real.chat(**sampled).json()["choices"][0]["message"]["content"]
    )
    stop = whole[4:6]
    cut = real.chat(**sampled, stop=[stop]).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == whole[: whole.index(stop)]


def test_usage_says_what_was_kept(real: Running) -> None:
    text = "a long text " * 12
    half, less = (
        real.chat(text, max_tokens=4, kvpress=own).json()["usage"]["kvpress"]
        for own in ({}, {"budget": 0.25})
    )
    assert 0 < less["slots_kept"] < half["slots_kept"] < half["slots_full"]
    assert 0 < less["bytes_held"] < half["bytes_held"]
    assert half["policy"].startswith("h2o:budget=0.5,")
    assert less["policy"].startswith("h2o:budget=0.25,")
    assert half["fraction"] == pytest.approx(0.5, abs=0.02)


def test_a_client_that_leaves_frees_what_it_held(real: Running) -> None:
    batcher = real.batcher
    before = batcher.stats().cancelled
    connection = real.raw(chat("Hello", max_tokens=800, stream=True))
    eventually(lambda: batcher.stats().running == 1 and batcher.stats().bytes_held > 0)
    connection.close()
    eventually(lambda: batcher.stats().running == 0)
    eventually(lambda: batcher.stats().bytes_held == batcher.stats().bytes_prefixes)
    assert batcher.stats().cancelled == before + 1


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"kvpress": {"budget": "much"}}, 400),
        ({"kvpress": {"policy": "nobody"}}, 400),
        ({"max_tokens": 10**6}, 400),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 413),
    ],
)
def test_what_the_batcher_refuses(more: dict[str, Any], status: int, real: Running) -> None:
    answer = real.post("/v1/chat/completions", {**chat(), **more})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_health_and_metrics_are_those_of_the_batcher(real: Running) -> None:
    assert real.get("/health").status_code == real.get("/ready").status_code == 200
    before = real.batcher.stats().generated_tokens
    real.chat(max_tokens=5)
    lines = real.get("/metrics").text.splitlines()
    drawn = next(x for x in lines if x.startswith("kvpress_generated_tokens_total{"))
    assert float(drawn.split()[-1]) == before + 5
    counted = next(x for x in lines if x.startswith("kvpress_first_token_seconds_count{"))
    assert float(counted.split()[-1]) >= 1


@pytest.mark.parametrize("requests", [1000, 300])
def test_requests_leave_no_memory_behind(requests: int, real: Running) -> None:
    def ask(number: int) -> None:
        """A short chat; every fourth has another prompt, every second streams."""
        text = f"{number % 4} asks for more"
        answer = real.chat(text, max_tokens=3, stream=number % 2 == 0)
        assert answer.status_code == 200

    before, sizes = real.batcher.stats().finished, list[int]()
    for _ in range(2):  # in the first half buffers grow to what eight requests at once need
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(ask, range(requests // 2)))
        gc.collect()
        trim()
        sizes.append(resident("VmRSS"))
    assert real.batcher.stats().finished == before + requests
    eventually(lambda: real.batcher.stats().bytes_held == real.batcher.stats().bytes_prefixes)
    assert sizes[1] - sizes[0] < 12 << 20
