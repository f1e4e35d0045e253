"""Named recipes: what was measured to keep most at a number of bytes, from the policies' folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvpress.errors import PolicyError

FILE = "recipes.json"


class Named(NamedTuple):
    """A recipe for a compression. bytes: share of a bfloat16 cache that it held, in %.

    score: tokens of answers right, in % of the full cache's, with the question hidden; measured:
    where, and of which file of results.
    """

    ratio: float
    recipe: str
    bytes: float
    score: float
    measured: str


@cache
def named(package: str) -> Mapping[str, tuple[Named, ...]]:
    """All of them by name, the weakest compression first."""
    for folder in importlib.import_module(package).__path__:
        file = Path(folder) / FILE
        if file.is_file():
            given = json.loads(file.read_text(encoding="utf-8"))
            return {
                name: tuple(sorted(Named(**entry) for entry in entries))
                for name, entries in given.items()
            }
    return {}


def recipe_of(name: str, entries: tuple[Named, ...], options: Mapping[str, str]) -> str:
    """The recipe of the least compression that was measured and is not below what was asked for.

    options: `ratio`. Raises PolicyError.
    """
    known = ", ".join(f"{entry.ratio:g}" for entry in entries)
    how = f"Write {name}:ratio=N, at most {entries[-1].ratio:g}; measured are {known}."
    if set(options) != {"ratio"}:
        given = ", ".join(options) or "none"
        raise PolicyError(f"{name!r} has one option, ratio, but given are: {given}. {how}")
    try:
        ratio = float(options["ratio"])
    except ValueError:
        ratio = 0.0
    if not 1 <= ratio <= entries[-1].ratio:
        raise PolicyError(f"{name}:ratio={options['ratio']} was not measured. {how}")
    return next(entry.recipe for entry in entries if entry.ratio >= ratio)
