"""What a report of an evaluation says."""

from __future__ import annotations

from typing import Any

from kvpress.bench.common.report import Report, machine, settings_of
from kvpress.bench.quality import plots, standard_table
from kvpress.bench.quality.results import Results
from kvpress.bench.quality.table import LEGEND, blocks, sheets


def report(results: Results) -> Report:
    """A sheet per task, length and protocol; quality against bytes, and needles."""
    made = list(blocks(results))

    def figures() -> list[Any]:
        drawn = [plots.quality(made), plots.needles(results)] if made else []
        return [figure for figure in drawn if figure is not None]

    facts = [*settings_of(results.settings), *machine(results.environment)]
    tables, legends = list(sheets(results)), [LEGEND] if made else []
    if (other := standard_table.sheet(results)) is not None:
        tables, legends = [*tables, other], [*legends, standard_table.LEGEND]
    return Report("Quality and bytes", facts, legends, tables, figures)
