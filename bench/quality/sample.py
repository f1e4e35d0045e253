"""What is asked about a context: tokens, made by the tokenizer of the model under test."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpress.bench.common.text import default_text

from kvpress.errors import KVPressError

_USER = "<the user's text>"  # stands for it in a chat template


class TaskError(KVPressError, ValueError):
    """A task that cannot be made of what was given."""


@dataclass(frozen=True)
class Question:
    """Tokens after the context, and the tokens that should follow them."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True)
class Extraction:
    """Tokens after the context that ask for a secret in it, which no answer may hold."""

    prompt: tuple[int, ...]
    secret: str
    label: str = ""


@dataclass(frozen=True)
class Sample:
    """A context and questions about it.

    depth: where the first answer stands in it, 0 to 1. protect: token ranges (first, behind the
    last) of the context that a caller would protect: its system prompt.
    """

    context: tuple[int, ...]
    questions: tuple[Question, ...]
    depth: float | None = None
    extractions: tuple[Extraction, ...] = ()
    protect: tuple[tuple[int, int], ...] = ()


class Writer:
    """Text to tokens, and a text to take contexts from."""

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.prefix: tuple[int, ...] = tuple(tokenizer("")["input_ids"])  # perhaps a first token
        self._given = text
        self._ends: dict[int, bool] = {}

    @functools.cached_property
    def _text(self) -> list[int]:
        return self.ids(default_text().content if self._given is None else self._given)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        made: str = self._tokenizer.decode(list(ids))
        return made

    def chat(self, system: str) -> tuple[str, str]:
        """What stands before and after a user's text: the model's template, or plain words.

        Raises TaskError where the template knows no system prompt.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            return f"System: {system}\n\nUser: ", "\n\nAssistant: "
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _USER}]
        try:
            whole: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes
            raise TaskError(f"The chat template takes no system prompt: {error}.") from error
        before, found, after = whole.partition(_USER)
        if not found or system not in before:
            raise TaskError("The chat template leaves out the system prompt or the user's text.")
        return before, after

    def question(self, prompt: str, answer: str, label: str = "") -> Question:
        """A question and its answer, tokenised as the one text that they are."""
        before, whole = self.ids(prompt), self.ids(prompt + answer)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
            min(len(before), len(whole)),
        )
        if same in (0, len(whole)):
            raise TaskError(
                f"The tokenizer leaves nothing of the question {prompt[-60:]!r} or of its answer."
            )
        return Question(tuple(whole[:same]), tuple(whole[same:]), label)

    def passage(self, tokens: int, generator: random.Random) -> list[int]:
        """A part of the text. Raises TaskError if it is too short."""
        if tokens > len(self._text):
            raise TaskError(
                f"The text has {len(self._text)} tokens, but {tokens} are needed. Give a longer"
                " --text or a shorter --length."
            )
        start = generator.randrange(len(self._text) - tokens + 1)
        return self._text[start : start + tokens]

    def insert(
        self, passage: Sequence[int], inserts: Sequence[tuple[float, Sequence[int]]]
    ) -> list[int]:
        """The passage with something put in at each of some depths, at the nearest sentence end."""
        ends = [i + 1 for i, token in enumerate(passage) if self._is_end(token)] or [len(passage)]
        places = sorted(
            ((min(ends, key=lambda e: abs(e - depth * len(passage))), x) for depth, x in inserts),
            key=lambda pair: pair[0],
        )
        made, done = [], 0
        for place, tokens in places:
            made += [*passage[done:place], *tokens]
            done = place
        return [*made, *passage[done:]]

    def _is_end(self, token: int) -> bool:
        if token not in self._ends:
            self._ends[token] = self._tokenizer.decode([token]).rstrip(" ").endswith((".", "\n"))
        return self._ends[token]
