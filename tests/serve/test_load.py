"""Many clients at once, and those that leave, read slowly, or wait for a model that has died."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest
from scripted import Batcher
from serving import Running, chat, events, eventually, request, serving

from kvpress.batching.handle import Event, Handle
from kvpress.batching.request import Drawn, Request
from kvpress.serve import feed as feeds
from kvpress.serve import texts
from kvpress.serve.app import LOOK_EVERY

CHAT = "/v1/chat/completions"


def own_text(asked: Request) -> str:
    return f"answer {asked.sampling.seed} " * 3


async def streamed(client: httpx.AsyncClient, server: Running, seed: int, leaves: bool) -> str:
    """The text of a stream, or of its beginning where its client leaves."""
    body = chat(stream=True, seed=seed)
    text = b""
    async with client.stream("POST", server.url + CHAT, json=body) as response:
        async for part in response.aiter_bytes():
            text += part
            if leaves and text.count(b"data: ") > 3:
                break
    return text.decode()


def said(stream: str) -> str:
    parts = [one["choices"][0]["delta"] for one in events(stream)[:-1]]
    return "".join(part.get("content", "") for part in parts)


def test_a_hundred_streams_of_which_thirty_are_left(tokenizer: Any) -> None:
    """The others get their own text to its end; of those that left nothing goes on."""

    def script(asked: Request) -> str:
        return "x" * 4000 if (asked.sampling.seed or 0) < 30 else own_text(asked)

    batcher = Batcher(tokenizer, script, pace=0.02)

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
            jobs = [streamed(client, server, seed, seed < 30) for seed in range(100)]
            return await asyncio.gather(*jobs)

    with serving(batcher, tokenizer) as server:
        streams = asyncio.run(all_of_them())
        eventually(lambda: not batcher.handles and not server.service.feeds)
        metrics = server.get("/metrics").text
    assert [said(text) for text in streams[30:]] == [f"answer {n} " * 3 for n in range(30, 100)]
    stats = batcher.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (70, 30, 0)
    assert 'kvpress_client_disconnects_total{policy="some:budget=0.5"} 30.0' in metrics


def test_a_client_that_leaves_before_its_answer_is_whole_ends_it(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.002)
    with serving(batcher, tokenizer) as server:
        with server.raw(chat(n=2)):
            eventually(lambda: len(batcher.handles) == 2)
        eventually(lambda: not batcher.handles)
        assert batcher.stats().cancelled == 2
        assert not server.service.feeds


def test_two_clients_with_one_id_get_each_their_own(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, own_text, pace=0.005)

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            headers = {"x-request-id": "same"}
            bodies = [chat(seed=seed) for seed in (1, 2)]
            jobs = [client.post(server.url + CHAT, json=b, headers=headers) for b in bodies]
            return await asyncio.gather(*jobs)

    with serving(batcher, tokenizer) as server:
        responses = asyncio.run(both())
    answers = [one.json()["choices"][0]["message"]["content"] for one in responses]
    assert answers == ["answer 1 " * 3, "answer 2 " * 3]
    assert {one.headers["x-request-id"] for one in responses} == {"same"}
    assert len({one.json()["id"] for one in responses}) == 2


def test_a_slow_reader_is_paused_then_given_up_and_slows_nobody(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MOST_EVENTS", 64)
    endless = {"stream": True, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}

    def script(asked: Request) -> str:
        return "z" * 4000 if asked.sampling.logprobs else "y" * 9

    batcher = Batcher(tokenizer, script, pace=0.0002, most_new=4000)
    with (
        serving(batcher, tokenizer, timeout=2.0, send_buffer=4096) as server,
        server.raw(chat(**endless)) as slow,
    ):
        slow.recv(10)
        (feed,) = server.service.feeds
        eventually(lambda: feed.late(time.monotonic(), 0.3))  # it waits to write, not to be asked
        eventually(lambda: all(handle.is_paused for handle in list(batcher.handles.values())))
        drawn = batcher.stats().generated_tokens
        assert server.chat().json()["choices"][0]["message"]["content"] == "y" * 9
        assert batcher.stats().generated_tokens == drawn + 10  # none of the slow one
        eventually(lambda: not batcher.handles)
        assert batcher.stats().cancelled == 1 and not server.service.feeds


def test_a_feed_goes_on_once_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_EVENTS", 4)

    async def read() -> list[bool]:
        handle = Handle(0, Request((1,), 9), lambda: None)
        feed, paused = feeds.Feed([handle]), []
        for count in (3, 1, 2):
            for _ in range(count):
                handle.deliver(Event((Drawn(5),)))
            paused.append(handle.is_paused)
        assert not feed.late(time.monotonic(), 1.0) and feed.late(time.monotonic() + 2, 1.0)
        assert len(await feed.take()) == 6
        paused.append(handle.is_paused)
        assert not feed.late(time.monotonic() + 2, 1.0)
        return paused

    assert asyncio.run(read()) == [False, True, True, False]


def test_when_the_model_has_died_everybody_is_told_within_a_second(tokenizer: Any) -> None:
    """Though its thread said nothing to anybody."""
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.002)

    async def ten() -> list[tuple[str, float]]:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:

            async def one(stream: bool) -> tuple[str, float]:
                response = await client.post(server.url + CHAT, json=chat(stream=stream))
                status = 200 if stream else 503
                assert response.status_code == status
                return response.text, time.monotonic()

            jobs = [asyncio.create_task(one(number % 2 == 0)) for number in range(10)]
            while len(batcher.handles) < 10:
                await asyncio.sleep(0.01)
            died.append(time.monotonic())
            batcher.die()
            return await asyncio.gather(*jobs)

    died: list[float] = []
    with serving(batcher, tokenizer) as server:
        assert server.get("/health").status_code == 200
        ends = asyncio.run(ten())
        assert LOOK_EVERY <= 0.5 and max(at for _, at in ends) - died[0] < 5.0  # a busy machine
        assert all('"code":"unavailable"' in text and "[DONE]" not in text for text, _ in ends)
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert server.get("/ready").status_code == 503
        assert server.chat().status_code == 503
        assert server.get("/metrics").status_code == 200


def test_a_model_that_makes_no_step_is_not_healthy(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.5)
    monkeypatch.setattr("kvpress.serve.service.LONGEST_STEP", 0.05)
    with serving(batcher, tokenizer) as server:
        assert server.get("/health").status_code == 200  # it has nothing to do
        with server.raw(chat()):
            eventually(lambda: server.get("/health").status_code == 503)


def test_a_prompt_that_takes_long_to_read_holds_up_nobody_and_few_may_wait(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, read = threading.Event(), texts.Texts.chat_ids

    def slow(self: Any, turns: Any, tools: Any) -> Any:
        assert gate.wait(20)
        return read(self, turns, tools)

    with serving(Batcher(tokenizer, pace=0.002), tokenizer) as server:
        monkeypatch.setattr(texts.Texts, "chat_ids", slow)
        monkeypatch.setattr(texts, "MOST_PENDING", 1)
        with server.raw(chat()) as waits:
            eventually(lambda: server.chat().status_code == 429)
            assert server.chat().headers["retry-after"] == "1"
            assert server.get("/health").status_code == 200
            assert not server.batcher.requests
            gate.set()
            assert waits.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: server.chat().status_code == 200)


def test_a_thousand_requests_leave_nothing_behind(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: "ok", pace=0.002)
    whole = b'"policy":"some:budget=0.5"}}}'

    async def some(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for number in range(count):
            writer.write(request(chat(stream=number % 2 == 0)))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n" if number % 2 == 0 else whole)
        writer.close()
        await writer.wait_closed()

    async def all_of_them() -> None:
        await asyncio.gather(*(some(50) for _ in range(20)))

    with serving(batcher, tokenizer) as server:
        asyncio.run(all_of_them())
        assert batcher.stats().finished == 1000
        assert not server.service.feeds and not batcher.handles
