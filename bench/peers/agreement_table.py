"""The table of kept positions: how far presses and policies agree, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Sheet
from kvpress.bench.peers.tokens_right import Scores, names_of

LEGEND = (
    "equal: positions that both keep, of those that the fuller one keeps, all rows together. least:"
    " of the row of one layer and KV head that agrees least. below: rows that agree in less than"
    " 99 %. copy, needle: right tokens, theirs and ours, the question hidden while compressing;"
    " only where they are known to differ."
)
_HEAD = ("press", "policy", "equal", "least", "layer, head", "below")


def sheet(rows: Sequence[Row], scores: Scores) -> Sheet:
    """A line per pair and budget, with what the two are known to differ in as notes."""
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    notes = (
        f"{row['press']}, {row['policy']}: {row['differs']}." for row in rows if row["differs"]
    )
    return Sheet(
        "Kept positions",
        (*_HEAD, *(f"{task} %" for task in tasks)),
        tuple(_line(row, scores, tasks) for row in rows),
        tuple(notes),
        labels=2,
    )


def _line(row: Row, scores: Scores, tasks: Sequence[str]) -> tuple[str, ...]:
    where, below = "{}, {}".format(*row["where"]), f"{row['below']} of {row['rows']}"
    shares = (f"{row[name]:.1%}" for name in ("equal", "least"))
    right = (" / ".join(score(scores, name, task) for name in names_of(row)) for task in tasks)
    return (row["press"], row["policy"], *shares, where, below, *right)


def score(scores: Scores, name: str, task: str) -> str:
    """Right tokens in percent; a dash where nothing was asked."""
    found = scores.get(name, {}).get(task)
    return "–" if found is None else f"{100 * found:.0f}"
