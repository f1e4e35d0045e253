"""Everything that the server asks of a tokenizer: ids of prompts, text of tokens, calls of tools.

Only what tokenizers of transformers offer publicly is used, and none of its own serving layer:
docs/serving.md says why.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from kvpress.errors import RefusedError
from kvpress.serve.problems import wrong

MOST_PENDING = 256  # requests whose texts are still to be read
_Answer = TypeVar("_Answer")


class Turn(NamedTuple):
    """What a model said. calls: of tools, in the form of OpenAI's clients."""

    text: str
    calls: list[dict[str, Any]]


class Texts:
    """A tokenizer, and the one thread in which long texts are read: streams go on meanwhile.

    It is one thread because tokenizers change while they work.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._thread = ThreadPoolExecutor(1, "kvpress-texts")
        self._pending = 0
        tokenizer("settles how texts are cut and padded", add_special_tokens=False)

    async def run(self, job: Callable[[], _Answer]) -> _Answer:
        """What a function returns, called in the thread. Raises RefusedError where many wait."""
        if self._pending >= MOST_PENDING:
            raise RefusedError(f"{self._pending} requests wait to be read. Try again later.")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Ends the thread once it is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Prompts

    def ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        """Of a prompt. Raises Problem."""
        ids = self._encoded(prompt, True) if isinstance(prompt, str) else prompt
        if not all(0 <= one < self._vocabulary for one in ids):
            allowed = f"Allowed: 0 to {self._vocabulary - 1}."
            raise wrong("prompt", f"prompt has token ids that the model does not know. {allowed}")
        if not ids:
            raise wrong("prompt", "prompt has no tokens. Give at least one.")
        return ids

    def chat_ids(self, chat: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[int, ...]:
        """Of a chat in the model's template, up to where its next turn begins. Raises Problem."""
        if not getattr(self._tokenizer, "chat_template", None):
            message = "The model has no chat template. Use /v1/completions."
            raise wrong("messages", message, "unsupported")
        text = self._rendered(chat, tools)
        if tools and text == self._rendered(chat, []):
            message = "The chat template of the model shows no tools. Leave them out."
            raise wrong("tools", message, "unsupported")
        ids = self._encoded(text, False)
        if not ids:
            raise wrong("messages", "messages are no text in the chat template of the model.")
        return ids

    def _rendered(self, chat: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat, tools=tools or None, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # templates raise what they like, with words of the chat
            message = (
                "The chat template of the model does not take these messages. Often the roles must"
                " alternate, or one of them is unknown to it."
            )
            raise wrong("messages", message, "invalid_template_input") from error

    def _encoded(self, text: str, special: bool) -> tuple[int, ...]:
        given = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return tuple(int(one) for one in given)

    # Answers

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without those that are no text."""
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def token(self, token: int) -> str:
        """One token as text, whatever it is."""
        return str(
            self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @property
    def parses(self) -> bool:
        """Whether calls of tools can be told from other text."""
        return getattr(self._tokenizer, "response_template", None) is not None

    def parse(
        self, tokens: Sequence[int], prefix: Sequence[int], tools: list[dict[str, Any]]
    ) -> Turn | None:
        """What a model said, with its calls; None where that cannot be read, and is plain text.

        prefix: the ids of the prompt.
        """
        try:
            said = self._tokenizer.parse_response(list(tokens), prefix=list(prefix), tools=tools)
            calls = [_call(each, place) for place, each in enumerate(said.get("tool_calls") or [])]
            return Turn(str(said.get("content") or ""), calls)
        except Exception:  # models write what they like: a call without an end, or without a name
            return None


def vocabulary(model: Any) -> int:
    """How many tokens a model knows."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _call(parsed: dict[str, Any], place: int) -> dict[str, Any]:
    function = parsed["function"]
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = {"name": function["name"], "arguments": text}
    ident = f"call_{uuid.uuid4().hex[:16]}_{place}"
    return {"id": ident, "type": "function", "function": named}
