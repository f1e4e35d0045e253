"""Tokens that the caller protects, and where the messages of a role stand among those of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpress.errors import CacheError, InputError
from kvpress.hf.cache import EngineCache
from kvpress.pipe.state.spans import ranges_of


def spans_of(
    tokenizer: Any, messages: Sequence[Any], role: str = "system", **options: Any
) -> list[tuple[int, int]]:
    """The token ranges `(first, behind the last)` of the messages of a role, for `protect=`.

    They are found by rendering the chat with and without each message, never by searching for its
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
        without = ids([*messages[:place], *messages[place + 1 :]])
        before = _common(whole, without) if place else 0
        after = _common(whole[::-1], without[::-1])
        # Both count what repeats around the message; together they are never more than is there.
        first, last = before, len(whole) - min(after, len(without) - before)
        if first >= last or len(without) >= len(whole):
            raise InputError(
                f"The chat template does not show where message {place} ({role}) stands: without it"
                f" the chat has {len(without)} tokens, with it {len(whole)}. Give token ranges."
            )
        spans.append((first, last))
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


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first elements are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
