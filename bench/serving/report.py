"""What a report of serving says: throughput and waiting, and how many find room under a cap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvpress.bench.common.candidates import FULL
from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.serving.measure import THEIRS, over, reference
from kvpress.bench.speed.rows import times

KIND = "serving"  # the value of "bench" in a record
MIB = 2**20
HEAD = (
    "candidate",
    "seconds",
    "low–high",
    "new tok/s",
    "all tok/s",
    "vs alone",
    "vs tf",
    "first s p50 / p95",
    "token ms p50 / p95",
    "at once",
    "MiB",
    "differ",
)
CAP_HEAD = ("policy", "at once", "of full", "MiB held", "of the cap", "seconds")
LEGEND = (
    "seconds: until the last token of all requests; new tok/s: drawn tokens; all tok/s: with those"
    " of the prompts; vs alone: speed-up over engine.generate for one after the other with the same"
    " policy; vs tf: over transformers' continuous batching; first: from the arrival of a request"
    " to its first token; token: between two tokens of a request; at once: requests that were"
    " served at the same time at most; MiB: of caches at most, of transformers' what it reserves;"
    " differ: requests whose tokens are not those of one by one with the same policy, of"
    " transformers' not those of full. Medians over the rounds, in which candidates take turns."
)


def to_record(
    rows: Mapping[str, Row],
    caps: Mapping[str, Mapping[str, Row]],
    environment: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    head = {"bench": KIND, "environment": environment, "settings": settings}
    return {**head, "candidates": rows, "caps": caps}


def report(record: Mapping[str, Any]) -> Report:
    """All sheets of a record."""
    facts = [*settings_of(record["settings"]), *machine(record["environment"])]
    return Report("Serving", facts, [LEGEND], list(sheets(record)), list)


def sheets(record: Mapping[str, Any]) -> Iterator[Sheet]:
    """Rounds, then a sheet per cap."""
    rows = record["candidates"]
    lines = tuple(cells(rows, name) for name in good(rows))
    yield Sheet("Serving", HEAD, lines, _errors(rows))
    for cap, found in record["caps"].items():
        held = tuple(cap_cells(found, policy) for policy in good(found))
        yield Sheet(f"At once under {cap}", CAP_HEAD, held, _errors(found))


def good(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Those that were measured."""
    return {name: row for name, row in rows.items() if not row.get("error")}


def _errors(rows: Mapping[str, Row]) -> tuple[str, ...]:
    return tuple(f"{name}: {row['error']}" for name, row in rows.items() if row.get("error"))


def cells(rows: Mapping[str, Row], name: str) -> tuple[str, ...]:
    """The cells of a line, as in HEAD."""
    row = rows[name]
    return (
        name,
        f"{row['seconds']['median']:.1f}",
        "{low:.1f}–{high:.1f}".format(**row["seconds"]),
        f"{row['new_per_second']:.1f}",
        f"{row['tokens_per_second']:.0f}",
        times(over(rows, name, reference(name))),
        times(over(rows, name, THEIRS)),
        " / ".join(_number(row[f"first_{p}"], 1, 2) for p in ("p50", "p95")),
        " / ".join(_number(row[f"token_{p}"], 1000, 0) for p in ("p50", "p95")),
        _number(row["running"], 1, 0),
        _number(row["bytes_held"], 1 / MIB, 0),
        "–" if row["differ"] is None else str(row["differ"]),
    )


def _number(figure: Mapping[str, Any], factor: float, digits: int) -> str:
    """A median; a dash where there is none."""
    found = figure["median"]
    return "–" if found is None else f"{factor * found:.{digits}f}"


def cap_cells(rows: Mapping[str, Row], policy: str) -> tuple[str, ...]:
    """The cells of a line, as in CAP_HEAD."""
    row, full = rows[policy], good(rows).get(FULL)
    ratio = None if full is None else row["running"] / full["running"]
    return (
        policy,
        str(row["running"]),
        times(ratio),
        f"{row['bytes_held'] / MIB:.1f}",
        f"{row['bytes_held'] / row['cap']:.1%}",
        f"{row['seconds']['median']:.1f}",
    )
