"""One run of benchmarks over a grid, from options to rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from kvpress.bench import progress, record
from kvpress.bench.commands import check_writable
from kvpress.bench.journal import Journal, Row
from kvpress.bench.speed import benches, beside, grid
from kvpress.bench.speed.rows import Cell, refuse_mixed_texts
from kvpress.bench.speed.setting import Setting


def run(
    setting: Setting,
    cells: Sequence[Cell],
    names: Sequence[str],
    asked: beside.Asked | None,
    out: Path | None,
    field: benches.Field | None = None,
) -> list[Row]:
    """The rows of all candidates in all cells, with quality if something is asked.

    out: JSON lines that the run goes on from; quality goes to a file beside it.
    """
    check_writable("--out", out)
    journal, field = Journal(out), field or benches.Own()
    setting = replace(setting, quality=asked and [*asked.tasks, asked.samples])
    refuse_mixed_texts([*journal, {"settings": setting.to_dict()}])  # before a long run
    facts = record.environment(torch.device(setting.device))
    load = functools.cache(setting.source.load)
    lengths = list(dict.fromkeys(cell.tokens for cell in cells))
    beside_out = None if out is None else out.with_suffix(".quality.jsonl")
    quality = asked and functools.cache(
        partial(beside.measure, asked, setting, field, load, names, lengths, facts, beside_out)
    )
    steps = [benches.rounds(cell.bench, setting, len(names)) for cell in cells]
    with progress.bar() as shown:
        task = progress.start(shown, sum(steps), "rounds")

        def on_cell(cell: Cell) -> None:
            shown.update(task, completed=sum(steps[: cells.index(cell) + 1]))

        measure = partial(benches.measure, setting, field, load, lambda _: shown.advance(task))
        return grid.fill(journal, cells, names, measure, setting, facts, quality, on_cell)
