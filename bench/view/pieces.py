"""Tokens as the pieces of text that they add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what the bytes of half a character decode to
_MOST = 4  # bytes of a character in UTF-8, so tokens that can share one


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; joined, it is the text of all.

    A character of several tokens goes to the last of them, the others get an empty text. Each token
    is decoded behind those of the character before it, since some tokenizers drop the first space.
    """
    found: list[str] = []
    context = whole = shown = 0  # where decoding starts; complete up to here; characters given
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[context:end])
        complete = not text.endswith(_HALF) or end - whole >= _MOST
        stable = text if complete else text.rstrip(_HALF)
        found.append(stable[shown:])
        shown = max(shown, len(stable))
        if complete:
            context, whole = whole, end
            shown = len(_decode(tokenizer, ids[context:end]))
    return found


def special(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The positions of tokens that are marks, not text: start, end, turns of a chat."""
    marks = set(tokenizer.all_special_ids)
    marks |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [position for position, number in enumerate(ids) if number in marks]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
