"""Tokens that only give a text its shape: punctuation and white space that come again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def structural(words: Sequence[str], repeats: int, factor: float) -> list[float]:
    """`factor` for tokens without letters or digits that come `repeats` times or more; else 1.

    What stands between two letters, digits or underscores, as the dots of a number do, is part of a
    word. So is what is no whole character (U+FFFD).
    """
    times = Counter(words)
    found = []
    for i, word in enumerate(words):
        before = words[i - 1][-1:] if i else ""
        after = words[i + 1][:1] if i + 1 < len(words) else ""
        content = any(_of_words(x) for x in word) or (_of_words(before) and _of_words(after))
        found.append(1.0 if content or times[word] < repeats else factor)
    return found


def _of_words(character: str) -> bool:
    return character.isalnum() or character in ("_", "\ufffd")
