"""Tables of serving, from what `kvpress bench serving` recorded. Figures are medians."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kvpress.bench.docs.tables import RESULTS, table
from kvpress.bench.serving import report

FILE = "serving.json"
MISSING = "Not recorded yet."


def rounds(record: Mapping[str, Any]) -> str:
    """A line per candidate."""
    rows = record["candidates"]
    return table(("", *report.HEAD[1:]), (report.cells(rows, name) for name in report.good(rows)))


def _made(make: Callable[[Mapping[str, Any]], str]) -> str:
    """A part, where results lie there already."""
    path = RESULTS / FILE
    return make(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else MISSING


PARTS: Mapping[str, Callable[[], str]] = {
    "serving": lambda: _made(rounds),
}
