"""What a report of an evaluation says."""

from __future__ import annotations

from typing import Any

from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.quality import instructions_table, plots, standard_table, summary, table
from kvpress.bench.quality.results import Results


def parts(results: Results) -> list[tuple[list[Sheet], str]]:
    """Tables that belong together, and what their columns mean; the summary comes last."""
    other = standard_table.sheet(results)
    every = [
        (list(table.sheets(results)), table.LEGEND),
        (list(instructions_table.sheets(results)), instructions_table.LEGEND),
        (list(summary.sheets(results)), summary.LEGEND),
        ([] if other is None else [other], standard_table.LEGEND),
    ]
    return [(sheets, legend) for sheets, legend in every if sheets]


def report(results: Results) -> Report:
    """A sheet per task, length and protocol, and over tasks; quality against bytes, and needles."""
    made = list(table.blocks(results))

    def figures() -> list[Any]:
        drawn = [plots.quality(made), plots.needles(results)] if made else []
        return [figure for figure in drawn if figure is not None]

    facts = [*settings_of(results.settings), *machine(results.environment)]
    shown = parts(results)
    legends = [legend for _, legend in shown]
    return Report(
        "Quality and bytes", facts, legends, [s for sheets, _ in shown for s in sheets], figures
    )
