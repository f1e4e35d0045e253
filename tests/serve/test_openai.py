"""OpenAI's own client package speaks with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted import WORDS, Batcher
from serving import Running, eventually, serving

KEY = "k" * 32
TURN: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def running(tokenizer: Any) -> Iterator[Running]:
    def script(request: Any) -> str:
        seed = request.sampling.seed
        return WORDS if seed is None else f"seed {seed}"

    batcher = Batcher(tokenizer, script, most_waiting=4)
    with serving(batcher, tokenizer, keys=(KEY,)) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with made(running) as found:
        yield found


def made(running: Running, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


def test_a_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=TURN, max_completion_tokens=100, user="somebody"
    )
    assert found.choices[0].message.content == WORDS
    assert found.usage is not None and found.usage.total_tokens > 50
    assert found.usage.kvpress["fraction"] == 0.5  # type: ignore[attr-defined]


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=TURN, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == WORDS and chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_stop_texts_seeds_and_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=TURN, stop=[" three"])
    assert found.choices[0].message.content == WORDS[: WORDS.index(" three")]
    found = client.chat.completions.create(
        model="tiny", messages=TURN, n=2, seed=3, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in found.choices] == ["seed 3", "seed 4"]
    told = found.choices[0].logprobs
    assert told is not None and told.content is not None
    assert [entry.token for entry in told.content] == list("seed 3")


def test_completions_and_models(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=["One", "Two"], max_tokens=4, echo=False)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvpress"


def test_budgets_go_in_the_body(client: openai.OpenAI, running: Running) -> None:
    body = {"kvpress": {"budget": "0.25"}}
    client.chat.completions.create(model="tiny", messages=TURN, extra_body=body)
    assert running.batcher.requests[-1].budget == "0.25"


def test_errors_are_of_its_classes(client: openai.OpenAI, running: Running) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="tiny", messages=TURN, presence_penalty=1.5)
    assert wrong.value.param == "presence_penalty" and wrong.value.code == "unsupported"
    with pytest.raises(openai.NotFoundError):
        create(model="other", messages=TURN)
    with pytest.raises(openai.RateLimitError) as full:
        create(model="tiny", messages=TURN, n=5)
    assert full.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.APIStatusError) as long:
        create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
    assert (long.value.status_code, long.value.code) == (413, "context_length_exceeded")
    with made(running, "wrong" * 8) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_an_error_in_a_stream_is_raised(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.005)
    with serving(batcher, tokenizer) as server, made(server) as client:
        stream = client.chat.completions.create(model="tiny", messages=TURN, stream=True)
        next(iter(stream))
        batcher.fail(ArithmeticError("secret"))
        with pytest.raises(openai.APIError, match="The server failed"):
            list(stream)
        stream.close()
        eventually(lambda: not server.service.feeds)


def test_a_client_that_closes_its_stream_ends_the_request(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.005)
    with serving(batcher, tokenizer) as server, made(server) as client:
        stream = client.chat.completions.create(model="tiny", messages=TURN, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: batcher.stats().cancelled == 1)
