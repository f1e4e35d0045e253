"""What a policy specification that cannot be read was meant to be."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from difflib import get_close_matches

_NUMBER = re.compile(r"\d*\.?\d+(%|[A-Za-z]+)?")
_REMOVED = "compression_ratio"  # elsewhere: the part that goes, where a budget is the part kept


def meant(text: str, options: Mapping[str, Collection[str]]) -> str | None:
    """The specification that the words of `text` make; None where they leave a doubt.

    options: every policy's, by its name. What separates the words, their case, and the endings
    that class names have do not matter; a number alone is a budget. Nothing is checked.
    """
    given: list[tuple[str, dict[str, str]]] = []
    key: str | None = None  # that waits for its value
    for word in re.findall(r"[\w.%-]+", re.sub(r"(?<=\d),(?=\d)", ".", text)):
        known = options[given[-1][0]] if given else ()
        if key is not None:
            name, value, key = *_option(key, word), None
        elif (found := _nearest(word, known)) or (word == _REMOVED and "budget" in known):
            key = found or word
            continue
        elif _NUMBER.fullmatch(word) and "budget" in known:
            name, value = _option("budget", word)
        else:
            policy = _nearest(re.sub("(press|policy|cache)$", "", word.lower()), options)
            if policy is None:
                return None
            given.append((policy, {}))
            continue
        if name in given[-1][1]:
            return None
        given[-1][1][name] = value
    if key is not None or not given:
        return None
    return "+".join(
        name + (":" if chosen else "") + ",".join(f"{k}={v}" for k, v in chosen.items())
        for name, chosen in given
    )


def _option(name: str, value: str) -> tuple[str, str]:
    """An option as it is written here."""
    percent = re.fullmatch(r"(\d+\.?\d*)%", value)
    if percent and name in ("budget", _REMOVED):
        value = str(Decimal(percent.group(1)) / 100)
    if name == _REMOVED and re.fullmatch(r"0?\.\d+", value):
        return "budget", str(1 - Decimal(value))
    return name, value


def _nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that a word must be, whatever its case, hyphens and single wrong letters."""
    plain = {re.sub("[_-]", "", name.lower()): name for name in names}
    given = re.sub("[_-]", "", word.lower())
    close = [given] if given in plain else get_close_matches(given, plain, n=2, cutoff=0.8)
    return plain[close[0]] if len(close) == 1 else None
