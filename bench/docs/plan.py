"""The table of plans, from what `kvpress bench plan` recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvpress.bench.common import journal
from kvpress.bench.docs.tables import RESULTS, table
from kvpress.bench.plan.record import HEAD, cells

FILE = "plan.jsonl"


def _plans() -> str:
    """Planned bytes beside the peak of a process of its own."""
    path = RESULTS / FILE
    if not path.is_file():
        return "Not recorded yet."
    rows = sorted(
        journal.read(path), key=lambda row: (row["asked"]["length"], row["asked"]["batch"])
    )
    place = rows[0]["environment"]
    said = (
        f"{rows[0]['model']}, float32, {rows[0]['asked']['new_tokens']} tokens decoded;"
        f" {place['cpu']}, {place['threads']} threads; `bench/results/{FILE}`:"
    )
    return f"{said}\n\n{table(HEAD, map(cells, rows))}"


PARTS: Mapping[str, Callable[[], str]] = {"plans": _plans}
