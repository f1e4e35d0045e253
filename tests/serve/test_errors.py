"""What is refused, in which words: nothing is passed over, and no error quotes a prompt."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from scripted import Batcher
from serving import Running, chat, events, eventually, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PARTS = [{"type": "image_url", "image_url": {"url": "x"}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{"}}

# What is wrong with a chat, and the field that the answer names.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_toks": 5}, "max_toks"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": PARTS}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": "REFUSE"}]}, "messages"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": -1}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3000}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"strict": True}}]}, "tools[0].function.name"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"generation_config": {"num_beams": 9}}, "generation_config"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"kvpress": {"budget": "plenty"}}, "kvpress.budget"),
    ({"kvpress": {"budget": "1e99999999"}}, "kvpress.budget"),
    ({"kvpress": {"budget": 1.5}}, "kvpress.budget"),
    ({"kvpress": {"budget": [1]}}, "kvpress.budget"),
    ({"kvpress": {"policy": "another:budget=0.1"}}, "kvpress.policy"),
    ({"kvpress": {"pages": 4}}, "kvpress.pages"),
    ({"kvpress": 0.5}, "kvpress"),
]


@pytest.fixture(scope="module")
def client() -> Any:
    with httpx.Client(timeout=30, trust_env=False) as made:
        yield made


@pytest.mark.parametrize(("change", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_a_field_that_cannot_be_answered_is_named(
    server: Running, client: httpx.Client, change: dict[str, Any], param: str
) -> None:
    before = len(server.batcher.requests)
    response = client.post(server.url + CHAT, content=json.dumps(chat("ask") | change))
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"]
    assert param in error["message"] or param == "messages" or "text alone" in error["message"]
    assert len(server.batcher.requests) == before and "REFUSE" not in response.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt[0]"),
        ({"prompt": ["x"] * 9, "n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_prompts_are_checked_as_well(server: Running, change: dict[str, Any], param: str) -> None:
    response = server.post(TEXT, {"model": "tiny", "prompt": "x"} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 60000, b"9" * 9000]
)
def test_what_is_no_object_in_json_is_400(server: Running, body: bytes) -> None:
    response = server.post(CHAT, body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_neutral_values_of_fields_that_are_not_supported_are_taken(server: Running) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": False,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "reasoning_effort": None,
    }
    assert server.chat(**neutral).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("POST", "/reset", 404), ("GET", CHAT, 405), ("POST", "/health", 405)],
)
def test_other_paths_and_methods_are_errors_of_the_same_form(
    server: Running, client: httpx.Client, method: str, path: str, status: int
) -> None:
    response = client.request(method, server.url + path)
    assert response.status_code == status and response.json()["error"]["message"]


def test_another_model_is_404(server: Running) -> None:
    response = server.post(CHAT, chat() | {"model": "other"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_what_is_too_long_is_413_and_says_how_long_it_may_be(server: Running) -> None:
    response = server.chat("x" * 5000)
    message = response.json()["error"]["message"]
    assert response.status_code == 413 and "4096" in message and "5024 tokens" in message
    assert server.chat("x" * 3000, max_tokens=2000).status_code == 413
    response = server.post(CHAT, b"x" * 10_000_000)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    parts = (b"x" * 50_000 for _ in range(10))  # whose length is not said
    with httpx.Client(timeout=30, trust_env=False) as client:
        assert client.post(server.url + CHAT, content=parts).status_code == 413


def test_a_full_queue_is_429_and_says_when_to_come_again(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: "x" * 500, most_waiting=2, pace=0.01)
    with serving(batcher, tokenizer) as server:
        with server.raw(chat(stream=True)):
            eventually(lambda: len(batcher.handles) == 1)
            response = server.chat(n=2)
            assert response.status_code == 429 and response.headers["retry-after"] == "7"
            assert response.json()["error"]["type"] == "rate_limit_error"
            eventually(lambda: len(batcher.handles) == 1)  # its first choice is withdrawn
        eventually(lambda: not batcher.handles)
        assert server.chat(max_tokens=1).status_code == 200


def test_keys_are_needed_where_there_are_some(tokenizer: Any) -> None:
    first, second = "a" * 32, "b" * 32
    with serving(Batcher(tokenizer), tokenizer, keys=(first, second)) as server:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": first}):
            response = server.post(CHAT, chat(), **header)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
            assert server.get("/v1/models", **header).status_code == 401
        assert server.post("/tokenize", {"prompt": "x"}).status_code == 401
        for key in (first, second, second):
            assert server.post(CHAT, chat(), authorization=f"Bearer {key}").status_code == 200
        tenants = [request.tenant for request in server.batcher.requests]
        assert tenants[0] != tenants[1] == tenants[2] and all(tenants)
        assert not any(key in tenant for key in (first, second) for tenant in tenants)
        assert server.get("/health").status_code == server.get("/metrics").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_has_an_id_and_says_nothing_else(
    tokenizer: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.005)
    with serving(batcher, tokenizer) as server:
        connection = server.raw(chat("secret words", stream=stream))
        eventually(lambda: bool(batcher.handles))
        batcher.fail(ArithmeticError('a "secret" of the prompt'))
        with connection, connection.makefile("rb") as file:
            head, _, body = file.read1(1 << 16).partition(b"\r\n\r\n")
            while b"error" not in body:
                body += file.read1(1 << 16)
    text = body.decode()
    assert head.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 500")
    assert "internal_error" in text and "secret" not in text and "[DONE]" not in text
    if stream:
        assert "event: error\ndata: {" in text
    ident = text.partition("under ")[2].partition(".")[0]
    assert ident in caplog.text and "ArithmeticError" in caplog.text
    assert "secret" not in caplog.text


def test_logs_say_sizes_and_times_but_no_text(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.chat("hush", stop="hush")
    server.get("/hush")
    server.post(CHAT, chat("hush", hush=1))
    assert "tokens read" in caplog.text and "another path 404" in caplog.text
    lines = [record.getMessage() for record in caplog.records if record.name == "kvpress.serve"]
    assert lines and not any("hush" in line or "Grüße" in line for line in lines)


def test_a_stream_that_fails_is_told_so_in_json_that_can_be_read(tokenizer: Any) -> None:
    from kvpress.errors import DeadlineError

    batcher = Batcher(tokenizer, lambda request: "x" * 4000, pace=0.005)
    with serving(batcher, tokenizer) as server:
        connection = server.raw(chat(stream=True))
        eventually(lambda: bool(batcher.handles))
        batcher.fail(DeadlineError('It took "too long".\n'))
        with connection, connection.makefile("rb") as file:
            body = b""
            while b"event: error" not in body or not body.endswith(b"\r\n\r\n"):
                body += file.read1(1 << 16)
        assert server.chat(max_tokens=2).status_code == 200  # others are served
    part = body.partition(b"event: error\n")[2].partition(b"\n\n")[0].decode()
    (told,) = events(part)
    assert told["error"]["message"] == 'It took "too long".\n'
    assert told["error"]["code"] == "deadline_exceeded"
