"""What a report of an evaluation says."""

from __future__ import annotations

from typing import Any

from kvpress.bench.quality import plots
from kvpress.bench.quality.results import Results
from kvpress.bench.quality.table import HEAD, LEGEND, Block, blocks, cells_of, notes_of
from kvpress.bench.report import Report, Sheet, machine


def report(results: Results) -> Report:
    """A sheet per task, length and protocol; quality against bytes, and needles."""
    made = list(blocks(results))

    def figures() -> list[Any]:
        drawn = [plots.quality(made), plots.needles(results)] if made else []
        return [figure for figure in drawn if figure is not None]

    given = (f"{k}: {v}" for k, v in results.settings.items() if v not in (None, False))
    facts = [*given, *machine(results.environment)]
    return Report("Quality and bytes", facts, [LEGEND], [_sheet(b) for b in made], figures)


def _sheet(block: Block) -> Sheet:
    lines = tuple(cells_of(line) for line in block.lines)
    return Sheet(plots.title(block), HEAD, lines, tuple(notes_of(block)))
