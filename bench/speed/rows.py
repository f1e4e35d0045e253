"""Rows of measurements as tables: one per cell, one line per candidate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from kvpress.bench.common.journal import JournalError, Row
from kvpress.bench.common.report import Sheet


class Cell(NamedTuple):
    """Candidates that were timed together: a benchmark at one length and batch."""

    bench: str
    tokens: int
    batch: int


@dataclass(frozen=True)
class Column:
    """A heading and what a row without an error shows under it."""

    title: str
    text: Callable[[Row], str]


def by_cell(rows: Iterable[Row]) -> dict[Cell, dict[str, Row]]:
    """Rows by cell and candidate, of each cell those that were measured together last.

    A file may hold a cell several times, with other settings or of another machine: a ratio of such
    rows would be none.
    """
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        cell = Cell(row["bench"], row["tokens"], row["batch"])
        together = found.setdefault(cell, {})
        if any(_run(other) != _run(row) for other in together.values()):
            together.clear()
        together[row["candidate"]] = row
    refuse_mixed_texts(row for together in found.values() for row in together.values())
    return found


def refuse_mixed_texts(rows: Iterable[Row]) -> None:
    """Raises JournalError where prompts were taken from several texts, which no table may mix."""
    texts = {json.dumps((row.get("settings") or {}).get("text"), sort_keys=True) for row in rows}
    if len(texts) > 1:
        raise JournalError(
            f"Rows of several texts cannot stand side by side: {', '.join(sorted(texts))}. Measure"
            " into another --out."
        )


def _run(row: Row) -> tuple[Any, Any]:
    """What rows of one run share."""
    return row.get("settings"), row.get("environment")


def sheets(rows: Iterable[Row], benches: dict[str, ModuleType]) -> Iterator[Sheet]:
    """A sheet per cell."""
    for cell, found in by_cell(rows).items():
        bench = benches[cell.bench]
        good = {name: row for name, row in found.items() if row["error"] is None}
        title = f"{bench.TITLE}: {cell.tokens:,} tokens, batch {cell.batch}"
        yield sheet(title, [*bench.columns(good), *quality(good)], found)


def sheet(title: str, columns: Sequence[Column], rows: dict[str, Row]) -> Sheet:
    """Rows by candidate under some columns; what failed is a note."""
    return Sheet(
        title,
        ("candidate", *(column.title for column in columns)),
        tuple(_line(name, row, columns) for name, row in rows.items()),
        tuple(f"{name}: {row['error']}" for name, row in rows.items() if row["error"]),
    )


def _line(name: str, row: Row, columns: Sequence[Column]) -> tuple[str, ...]:
    if row["error"] is not None:
        return (name, "failed", *("–" for _ in columns[1:]))
    return (name, *(column.text(row) for column in columns))


def quality(rows: dict[str, Row]) -> list[Column]:
    """A column per task that was measured besides, if any."""
    tasks = dict.fromkeys(
        scored["task"] for row in rows.values() for scored in row.get("quality") or ()
    )
    return [Column(f"{task} %", partial(_score, task)) for task in tasks]


def _score(task: str, row: Row) -> str:
    found = next((scored for scored in row["quality"] if scored["task"] == task), None)
    if found is None or found["score"] is None:
        return "–"
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * found[k] for k in ("score", "low", "high")))


def against(base: Row | None, row: Row) -> float | None:
    """How many times as fast as `base`, from the medians; None where that was not measured."""
    return None if base is None else float(base["seconds"]["median"] / row["seconds"]["median"])


def milliseconds(seconds: float) -> str:
    """Four digits at most."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.1f}"


def of_ideal(ratio: float | None, ideal: float) -> str:
    """A ratio, and in brackets what would be possible."""
    return "–" if ratio is None else f"{ratio:.2f}× ({ideal:.2f})"


def times(ratio: float | None) -> str:
    """A ratio, or a dash."""
    return "–" if ratio is None else f"{ratio:.2f}×"
