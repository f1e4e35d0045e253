"""A table in Markdown, and where the results lie that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are aligned to the right."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """As `table`, of texts."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def code(text: str) -> str:
    """As code."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """On one line, with what would end a cell escaped."""
    return " ".join(text.split()).replace("|", "\\|")
