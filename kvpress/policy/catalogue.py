"""What `kvpress policies` and the documentation say of every policy, from its docstring."""

from __future__ import annotations

import dataclasses
import sys
from typing import NamedTuple

from kvpress.policy.base import Policy
from kvpress.policy.loading import available, recipes
from kvpress.policy.options import as_text


class Entry(NamedTuple):
    """A policy: its name, the first paragraph of its docstring, its options and defaults."""

    name: str
    summary: str
    options: dict[str, tuple[str, str]]  # name -> (default, help)


def entries() -> list[Entry]:
    """Every installed policy."""
    return [_entry(name, cls) for name, cls in available().items()]


def markdown() -> str:
    """All of them as a table in Markdown."""
    lines = ["| policy | what it does | options and defaults |", "|---|---|---|"]
    for entry in entries():
        options = ", ".join(f"`{name}={default}`" for name, (default, _) in entry.options.items())
        lines.append(f"| `{entry.name}` | {entry.summary} | {options or 'none'} |")
    return "\n".join(lines)


def named() -> list[tuple[str, str, str]]:
    """Named recipes: how each is written, what it is, and what was measured of it."""
    return [
        (
            f"{name}:ratio={entry.ratio:g}",
            entry.recipe,
            f"{entry.score:g} % of the full cache's answers at {entry.bytes:g} % of its bytes"
            f" ({entry.measured})",
        )
        for name, entries in recipes().items()
        for entry in entries
    ]


def _entry(name: str, cls: type[Policy]) -> Entry:
    doc = sys.modules[cls.__module__].__doc__ or ""
    options = {
        f.name: (as_text(f.default), str(f.metadata.get("help", "")))
        for f in dataclasses.fields(cls)
    }
    return Entry(name, " ".join(doc.split("\n\n")[0].split()), options)
