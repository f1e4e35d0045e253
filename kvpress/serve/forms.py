"""The JSON of answers, in the forms of OpenAI's chats and completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvpress.batching.request import Drawn, Usage

DONE = b"data: [DONE]\n\n"


class Said(NamedTuple):
    """A part of an answer, or all of it. reason: how it ended, None before that.

    drawn: its tokens with the places where they begin. calls: of tools.
    """

    choice: int
    text: str
    drawn: tuple[tuple[Drawn, int], ...] = ()
    calls: list[dict[str, Any]] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Form:
    """How one request is answered.

    token: the text of a token. told: whether probabilities are told.
    """

    ident: str
    created: int
    model: str
    chat: bool
    told: bool
    token: Callable[[int], str]

    def whole(self, answers: Sequence[Said], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        return self._around("chat.completion", [self._answer(one) for one in answers], usage)

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        """A piece of a stream. usage: with which it is told, or None before the end."""
        made = self._around("chat.completion.chunk", choices, None)
        del made["usage"]
        return made | usage

    def _around(self, kind: str, choices: list[dict[str, Any]], usage: Any) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.ident}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def _answer(self, said: Said) -> dict[str, Any]:
        choice = self._choice(said.choice, self._logprobs(said.drawn), said.reason)
        if not self.chat:
            return choice | {"text": said.text}
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            message |= {"content": said.text or None, "tool_calls": said.calls}
        return choice | {"message": message}

    def opening(self, choice: int) -> dict[str, Any]:
        """What the stream of a chat begins with."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._choice(choice, None, None) | {"delta": delta}

    def pieces(self, said: Said) -> list[dict[str, Any]]:
        """A part, and the end where it is one."""
        found = []
        if said.text or said.drawn or said.calls:
            choice = self._choice(said.choice, self._logprobs(said.drawn), None)
            delta: dict[str, Any] = {"content": said.text} if said.text or not said.calls else {}
            if said.calls:
                calls = [{"index": place, **call} for place, call in enumerate(said.calls)]
                delta["tool_calls"] = calls
            found.append(choice | ({"delta": delta} if self.chat else {"text": said.text}))
        if said.reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            found.append(self._choice(said.choice, None, said.reason) | end)
        return found

    def _choice(self, index: int, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, drawn: Sequence[tuple[Drawn, int]]) -> dict[str, Any] | None:
        if not self.told:
            return None
        if self.chat:
            return {"content": [self._entry(one) for one, _ in drawn], "refusal": None}
        return {
            "tokens": [self.token(one.token) for one, _ in drawn],
            "token_logprobs": [_finite(one.logprob) for one, _ in drawn],
            "top_logprobs": [
                {self.token(token): _finite(value) for token, value in one.top} for one, _ in drawn
            ],
            "text_offset": [place for _, place in drawn],
        }

    def _entry(self, drawn: Drawn) -> dict[str, Any]:
        top = [self._value(token, value) for token, value in drawn.top]
        return self._value(drawn.token, drawn.logprob) | {"top_logprobs": top}

    def _value(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token(token)
        # A token that is a part of a character has no text of its own, and its bytes are not known.
        whole = "\ufffd" not in text
        spelled = list(text.encode()) if whole else None
        return {"token": text, "logprob": _finite(logprob), "bytes": spelled}


def _finite(logprob: float | None) -> float | None:
    """JSON knows no infinity; of a token that cannot be drawn OpenAI says -9999."""
    return None if logprob is None else max(logprob, -9999.0)


def usage(usages: Sequence[Usage], choices: int, policy: str) -> dict[str, Any]:
    """What a request took. choices: answers of each prompt, which is counted once."""
    prompt = sum(one.prompt_tokens for one in usages[::choices])
    cached = sum(one.cached_tokens for one in usages[::choices])
    new = sum(one.completion_tokens for one in usages)
    kept, full = sum(one.slots_kept for one in usages), sum(one.slots_full for one in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "kvpress": {
            "slots_kept": kept,
            "slots_full": full,
            "bytes_held": sum(one.bytes_held for one in usages),
            "fraction": kept / full if full else None,
            "cached_tokens": cached,
            "policy": policy,
        },
    }


def dumped(value: Any) -> bytes:
    """JSON; halves of surrogate pairs, which a client may have sent, are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def event(value: Any, name: str | None = None) -> bytes:
    """An event of a stream."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumped(value) + b"\n\n"
