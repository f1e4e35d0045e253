"""Tables of kept positions: NVIDIA's presses beside our policies, from `bench/results`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvpress.bench.common.journal import Row, read
from kvpress.bench.docs import quality
from kvpress.bench.docs.quality import BLIND
from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.quality.table import Line

SHARES, RIGHT = "positions-1000.jsonl", "positions-1000.quality.jsonl"
TASKS = ("copy", "needle")


def positions() -> str:
    """A line per pair: how far they agree at every budget, and what they are known to differ in."""
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read(RESULTS / SHARES):
        pairs.setdefault((_plain(row, "press"), _plain(row, "policy")), {})[row["budget"]] = row
    budgets = sorted({budget for rows in pairs.values() for budget in rows})
    head = (f"{percent(float(b))}: {what}" for b in budgets for what in ("equal", "least row"))
    lines = (
        (
            f"{code(press)}, {code(policy)}",
            *(cell for budget in budgets for cell in _shares(rows.get(budget))),
            next(iter(rows.values()))["differs"] or "none",
        )
        for (press, policy), rows in pairs.items()
    )
    return table(("theirs, ours", *head, "known difference"), lines)


def right() -> str:
    """What is still known, by those that are known to differ; KL on copies."""
    copies, needles = (quality.lines(RIGHT)[task, 1000, "hidden"] for task in TASKS)
    lines = (
        (code(name), str(line.score), str(needles[name].score), _kl(line))
        for name, line in copies.items()
        if name != BLIND
    )
    return table(("", *(f"{task}, %" for task in TASKS), "KL of copies"), lines)


def _kl(line: Line) -> str:
    return "–" if line.kl is None else f"{line.kl:.3f}"


def _shares(row: Row | None) -> Iterator[str]:
    if row is None:
        return iter(("–", "–"))
    return iter((percent(row["equal"], 2), percent(row["least"], 1)))


def _plain(row: Row, name: str) -> str:
    """A press or policy as it is written without its budget."""
    text: str = row[name]
    for before in (",", ":"):
        text = text.replace(f"{before}budget={row['budget']}", "")
    return text


PARTS: Mapping[str, Callable[[], str]] = {"positions": positions, "positions-right": right}
