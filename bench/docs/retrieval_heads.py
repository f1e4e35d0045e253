"""Tables of retrieval heads: attention recalled by what they would read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from kvpress.bench.distill import report
from kvpress.bench.distill.recall import OWN, RANDOM, RECENCY, SHARED, Row
from kvpress.bench.docs.tables import RESULTS, code, table

FILE = "retrieval-heads.json"
_BASELINES = (RECENCY, RANDOM, SHARED, OWN)
_MISSING = "Not recorded yet."


def _rows(name: str = "rows") -> list[Row]:
    """What was measured; nothing where there is no file."""
    path = RESULTS / FILE
    if not path.is_file():
        return []
    return report.rows_of(json.loads(path.read_text(encoding="utf-8")), name)


def _recalled() -> str:
    """A line per ranking of every kind of text and unit."""
    rows = _rows()
    if not rows:
        return _MISSING
    lines = []
    for kind, unit in dict.fromkeys((row.kind, row.unit) for row in rows):
        own = [row for row in rows if (row.kind, row.unit) == (kind, unit)]
        lines += [
            (_named(name), kind, f"single {unit}" if unit == "tokens" else unit, *cells)
            for name, *cells in report.lines_of(own)
        ]
    return table(("", "text", "chosen", *report.head_of(rows)[1:]), lines)


def _layers() -> str:
    """By how much the first head finds more than others, and in how many layers it surely does."""
    rows = _rows("gains")
    if not rows:
        return _MISSING
    first, lines = _rows()[0].ranking, []
    for kind, unit in dict.fromkeys((row.kind, row.unit) for row in rows):
        own = [row for row in rows if (row.kind, row.unit) == (kind, unit)]
        for name in dict.fromkeys(row.ranking for row in own):
            some = [row for row in own if row.ranking == name]
            more, less, of = report.above(some)
            gains = (report.cell(row) for row in some)
            lines.append((_named(name), kind, unit, *gains, f"{more}, {less} of {of}"))
    heads = (f"{read:,} tokens" for read in dict.fromkeys(row.read for row in rows))
    return table((f"{code(first)} over", "text", "chosen", *heads, "more, less"), lines)


def _named(ranking: str) -> str:
    return ranking if ranking in _BASELINES else code(ranking)


PARTS: Mapping[str, Callable[[], str]] = {
    "retrieval-heads": _recalled,
    "retrieval-heads-layers": _layers,
}
