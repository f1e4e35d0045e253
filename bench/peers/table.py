"""The table of a comparison: bytes, quality and time of all candidates at one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from kvpress.bench.common.candidates import BASELINE
from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Sheet
from kvpress.bench.speed.rows import Column, by_cell, milliseconds, quality, sheet

LEGEND = (
    "kept: bytes of all storages that the cache keeps alive, of those of transformers'"
    " DynamicCache. TTFT: milliseconds to the first token. ms: of one decode step, median. copy,"
    " needle: right answers, the question hidden while compressing, [95 % bootstrap over contexts]."
    " KL: next-token distribution beside the full cache, nats, on the first task."
)


def sheets(rows: Sequence[Row]) -> Iterator[Sheet]:
    """A sheet per length."""
    cells = by_cell(rows)
    for cell, steps in cells.items():
        if cell.bench != "decode":
            continue
        first = cells.get(cell._replace(bench="prefill"), {})
        good = {name: row for name, row in steps.items() if row["error"] is None}
        columns = [
            Column("MiB", lambda row: f"{row['bytes_held'] / 2**20:.1f}"),
            Column("kept", partial(_share, good.get(BASELINE))),
            Column("TTFT", partial(_first_token, first)),
            Column("ms", lambda row: milliseconds(row["seconds"]["median"])),
            *quality(good),
            Column("KL", _kl),
        ]
        yield sheet(f"Peers: {cell.tokens:,} tokens", columns, steps)


def _share(base: Row | None, row: Row) -> str:
    return "–" if base is None else f"{row['bytes_held'] / base['bytes_held']:.1%}"


def _first_token(rows: dict[str, Row], row: Row) -> str:
    found = rows.get(row["candidate"])
    return "–" if found is None or found["error"] else milliseconds(found["seconds"]["median"])


def _kl(row: Row) -> str:
    values = [score["kl"] for score in row["quality"] if score["kl"] is not None]
    return f"{values[0]:.3f}" if values else "–"
