"""The table of kept positions: how far presses and policies agree, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Sheet

LEGEND = (
    "equal: positions that both keep, of those that the fuller one keeps, all rows together. least:"
    " of the row of one layer and KV head that agrees least. below: rows that agree in less than"
    " 99 %. copy, needle: right tokens, theirs and ours, the question hidden while compressing."
)
_HEAD = ("press", "policy", "equal", "least", "layer, head", "below")


def sheet(rows: Sequence[Row]) -> Sheet:
    """A line per pair and budget, with what the two are known to differ in as notes."""
    tasks = list(dict.fromkeys(asked["task"] for row in rows for asked in row["quality"]["ours"]))
    notes = (f"{row['press']}: {row['differs']}." for row in rows if row["differs"])
    return Sheet(
        "Kept positions",
        (*_HEAD, *(f"{task} %" for task in tasks)),
        tuple(_line(row, tasks) for row in rows),
        tuple(dict.fromkeys(notes)),
        labels=2,
    )


def _line(row: Row, tasks: Sequence[str]) -> tuple[str, ...]:
    where, below = "{}, {}".format(*row["where"]), f"{row['below']} of {row['rows']}"
    shares = (f"{row[name]:.1%}" for name in ("equal", "least"))
    right = (" / ".join(score(row, whose, task) for whose in ("theirs", "ours")) for task in tasks)
    return (row["press"], row["policy"], *shares, where, below, *right)


def score(row: Row, whose: str, task: str) -> str:
    """Right tokens in percent of `theirs`, `ours` or `full`; a dash where nothing was asked."""
    found = next((asked for asked in row["quality"][whose] if asked["task"] == task), None)
    return "–" if found is None or found["score"] is None else f"{100 * found['score']:.0f}"
