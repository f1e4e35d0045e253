"""Tokens that the caller protects, and where the messages of a role stand among those of a chat."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from kvpress.errors import CacheError, InputError
from kvpress.hf.cache import EngineCache
from kvpress.pipe.state.spans import ranges_of

_OTHERS = ("0 other one", "9 words")  # that begin and end in different ways


def spans_of(
    tokenizer: Any, messages: Sequence[Any], role: str = "system", **options: Any
) -> list[tuple[int, int]]:
    """The token ranges `(first, behind the last)` of the messages of a role, for `protect=`.

    They are found by rendering the chat with other messages and without, never by searching for the
    text; a first message has everything before it, too. options: those of the tokenizer's
    `apply_chat_template`, the same as for the prompt itself. Raises InputError where the role has
    no message, or the template does not let it be told apart.
    """

    def ids(given: Sequence[Any]) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            list(given), **{"add_generation_prompt": True, **options, "tokenize": False}
        )
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    whole, spans = ids(messages), []
    for place, message in enumerate(messages):
        if message.get("role") != role:
            continue
        # Where another content makes a difference, and where the message is gone: the template may
        # put a default in its place, or refuse to go without it.
        others = [{**message, "content": text} for text in _OTHERS]
        variants = [[*messages[:place], other, *messages[place + 1 :]] for other in others]
        first, last = _place(whole, [ids(variant) for variant in variants])
        with contextlib.suppress(Exception):  # whatever a template raises
            without = ids([*messages[:place], *messages[place + 1 :]])
            gone = _place(whole, [without], starts=place == 0)
            first, last = min(first, gone[0]), max(last, gone[1])
        if first >= last:
            raise InputError(
                f"The chat template does not show where message {place} ({role}) stands. Give token"
                " ranges."
            )
        spans.append((0 if place == 0 else first, last))
    if not spans:
        roles = sorted({str(message.get("role")) for message in messages})
        raise InputError(f"No message has the role {role!r}. The chat has {', '.join(roles)}.")
    return spans


def protect(cache: EngineCache, spans: Any) -> None:
    """Says, before any token is read, which ones are never evicted; see `engine.new_cache`.

    Raises CacheError for what is no range, and afterwards.
    """
    if cache.columns_seen:
        raise CacheError(
            f"protect= must be said before the first tokens are read; this cache has seen"
            f" {cache.columns_seen}. Make a new one: engine.new_cache(protect=...)."
        )
    several = isinstance(spans, Sequence) and not isinstance(spans, str) and bool(spans)
    each = several and all(not isinstance(x, tuple) for x in spans)
    ranges = [ranges_of(x) for x in (spans if each else [spans])]
    cache.context.protect = ranges[:1] if len(set(ranges)) == 1 else ranges


def _place(
    whole: Sequence[int], others: Sequence[Sequence[int]], starts: bool = False
) -> tuple[int, int]:
    """The range of a chat in which the others, all of which differ from it, are not the same.

    starts: whether it begins with the first token, even if others begin alike.
    """
    before = 0 if starts else min(_common(whole, other) for other in others)
    after = min(min(_common(whole[::-1], x[::-1]), len(x) - before) for x in others)
    return before, len(whole) - max(0, min(after, len(whole) - before))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first elements are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
