"""What clients get: chats and completions, at once and as streams, with usage and probabilities."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted import WORDS, Batcher
from serving import Running, chat, events, serving, tiny_tokenizer

FIRST = WORDS[:20]


def texts_of(stream: list[Any], choice: int = 0) -> str:
    """What a stream says in one choice."""
    deltas = [one["choices"] for one in stream if one != "[DONE]"]
    parts = [each[0] for each in deltas if each and each[0]["index"] == choice]
    return "".join(
        part["delta"].get("content", "") if "delta" in part else part["text"] for part in parts
    )


def test_a_chat_is_answered_with_its_usage(server: Running) -> None:
    body = server.chat(kvpress={"budget": 0.5}).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": WORDS, "refusal": None}
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("stop", 0, None)
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    sent, new = len("<user>Hello</user><assistant>"), len(WORDS.encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": sent,
        "completion_tokens": new,
        "total_tokens": sent + new,
        "prompt_tokens_details": {"cached_tokens": 3},
        "kvpress": {
            "slots_kept": 50,
            "slots_full": 100,
            "bytes_held": 1000,
            "fraction": 0.5,
            "cached_tokens": 3,
            "policy": "some:budget=0.5",
        },
    }
    assert server.batcher.requests[-1].budget == 0.5


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_the_same_and_ends_with_done(server: Running, usage: bool) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": usage})
    assert response.headers["content-type"].startswith("text/event-stream")
    stream = events(response.text)
    assert stream[-1] == "[DONE]" and texts_of(stream) == WORDS
    assert stream[0]["choices"][0]["delta"]["role"] == "assistant"
    ends = [one["choices"][0]["finish_reason"] for one in stream[:-1] if one["choices"]]
    assert ends == [None] * (len(ends) - 1) + ["stop"]
    assert len({one["id"] for one in stream[:-1]}) == 1
    if usage:
        assert stream[-2]["choices"] == [] and stream[-2]["usage"]["completion_tokens"] > 10
        assert all(one["usage"] is None for one in stream[:-2])
    else:
        assert not any("usage" in one for one in stream[:-1])


def test_characters_are_whole_in_every_piece(server: Running) -> None:
    stream = events(server.chat(stream=True).text)
    assert not any("\ufffd" in json.dumps(one, ensure_ascii=False) for one in stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stops", [True, False], ids=["batcher", "server"])
def test_stop_texts_end_it_and_are_not_shown(tokenizer: Any, stops: bool, stream: bool) -> None:
    """Whether the batcher sees them or not; the longer one begins earlier and never comes."""
    batcher = Batcher(tokenizer, lambda request: "a STOX b STOP c" * 90, stops=stops)
    with serving(batcher, tokenizer) as server:
        response = server.chat(stop=["STOP", "STOX c"], stream=stream, max_tokens=1000)
    if stream:
        found = events(response.text)
        text, reason = texts_of(found), found[-2]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("a STOX b ", "stop")
    assert batcher.stats().generated_tokens < 200


def test_choices_have_seeds_of_their_own_and_share_a_prompt(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda request: f"seed {request.sampling.seed}")
    with serving(batcher, tokenizer) as server:
        body = server.chat(n=3, seed=5, temperature=0.7, top_p=0.9).json()
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert texts == ["seed 5", "seed 6", "seed 7"]
        assert body["usage"]["prompt_tokens"] == len(batcher.requests[0].ids)
        stream = events(server.chat(n=2, seed=8, stream=True).text)
        assert [texts_of(stream, choice) for choice in (0, 1)] == ["seed 8", "seed 9"]
    assert {request.sampling.temperature for request in batcher.requests} == {0.7, None}


def test_completions_take_texts_and_ids(server: Running) -> None:
    ids = list(server.batcher.requests[0].ids) if server.batcher.requests else [5, 6]
    for prompt, choices in (("One", 1), (ids, 1), (["One", "Two"], 2), ([ids, ids], 2)):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12}
        answer = server.post("/v1/completions", body).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [WORDS.encode()[:12].decode()] * choices
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["object"] == "text_completion"
    stream = events(server.post("/v1/completions", body | {"stream": True}).text)
    assert texts_of(stream, 1) == texts[1] and stream[-1] == "[DONE]"


def test_probabilities_come_with_the_tokens_that_are_shown(server: Running) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "stop": "One", "max_tokens": 200}
    (choice,) = server.chat(**asked).json()["choices"]
    told = choice["logprobs"]["content"]
    shown = WORDS[: WORDS.index("One")].encode()
    assert len(told) == len(shown) and told[0]["bytes"] == [ord("G")] and told[2]["bytes"] is None
    assert told[0]["top_logprobs"] == [{"token": "G", "logprob": -0.5, "bytes": [71]}] * 2
    streamed = [
        entry
        for one in events(server.chat(**asked, stream=True).text)[:-1]
        for entry in (one["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == told
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "logprobs": 1}
    told = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert told["text_offset"] == [0, 1, 2] and told["token_logprobs"] == [-0.5] * 3
    assert told["top_logprobs"][0] == {"G": -0.5}


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


CALLED = 'I add. <call>{"name": "add", "arguments": {"a": 1}}</call>'
READ = {  # how this tokenizer's texts are read, in the form of transformers
    "start_anchor": "<assistant>",
    "defaults": {"role": "assistant"},
    "fields": {
        "content": {},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_read_where_the_tokenizer_can(stream: bool) -> None:
    own = tiny_tokenizer()
    own.response_template = READ
    with serving(Batcher(own, lambda request: CALLED), own) as server:
        response = server.chat(tools=[TOOL], tool_choice="auto", stream=stream)
        plain = server.chat(tools=[TOOL], tool_choice="none").json()
        cut = server.chat(tools=[TOOL], max_tokens=20).json()
    if stream:
        deltas = [one["choices"][0] for one in events(response.text)[:-1]]
        (calls,) = [one["delta"]["tool_calls"] for one in deltas if "tool_calls" in one["delta"]]
        reason, content = deltas[-1]["finish_reason"], texts_of(events(response.text))
    else:
        (choice,) = response.json()["choices"]
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
        content = choice["message"]["content"]
    ((name, arguments),) = [one["function"].values() for one in calls]
    assert (name, json.loads(arguments)) == ("add", {"a": 1}) and calls[0]["id"]
    assert (reason, content.strip()) == ("tool_calls", "I add.")
    assert plain["choices"][0]["message"]["content"] == CALLED
    said = cut["choices"][0]  # a call without its end is text
    assert (said["message"]["content"], said["finish_reason"]) == (CALLED[:20], "length")


def test_tools_without_a_parser_leave_the_text_as_it_is(server: Running) -> None:
    body = server.chat(tools=[TOOL]).json()
    assert body["choices"][0]["message"]["content"] == WORDS
    prompt = server.batcher.requests[-1].ids
    assert len(prompt) > len("<user>Hello</user><assistant>") + 20


def test_a_history_with_calls_reaches_the_template(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}],
        },
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    answer = server.post("/tokenize", {"messages": turns}).json()
    text = tiny_tokenizer().decode(answer["tokens"])
    assert answer["count"] == len(answer["tokens"]) and text.startswith("<system>Be brief</system>")
    assert '"arguments": {"a": 1}' in text and text.endswith("<tool>2</tool><assistant>")


def test_models_and_tokens_can_be_asked_for(server: Running) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    assert model == server.get("/v1/models/tiny").json()
    assert model["id"] == "tiny" and model["max_model_len"] == server.batcher.most_context
    assert server.get("/v1/models/other/one").json()["error"]["code"] == "model_not_found"
    assert server.post("/tokenize", {"prompt": "Grüße"}).json()["count"] == 7
    assert server.get("/health").json()["status"] == "ok"
    assert server.get("/ready").json()["status"] == "ready"


def test_a_client_gets_its_own_id_back_as_far_as_it_is_harmless(server: Running) -> None:
    for given, echoed in (("mine-1", "mine-1"), ("a<b>\tc" + "x" * 99, "abc" + "x" * 61)):
        response = server.post("/v1/chat/completions", chat(), **{"x-request-id": given})
        assert response.headers["x-request-id"] == echoed
        assert given not in response.json()["id"]
    assert len(server.get("/health").headers["x-request-id"]) == 32
