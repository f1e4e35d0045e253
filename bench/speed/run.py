"""One run of benchmarks over a grid, from options to rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from kvpress.bench.common import progress
from kvpress.bench.common.environment import environment
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.common.output import check_writable, say_if_nothing_was_measured
from kvpress.bench.speed import benches, grid, scores
from kvpress.bench.speed.rows import Cell, refuse_mixed_texts
from kvpress.bench.speed.setting import Setting


def run(
    setting: Setting,
    cells: Sequence[Cell],
    names: Sequence[str],
    options: scores.QualityOptions | None,
    out: Path | None,
    candidates: benches.Candidates | None = None,
) -> list[Row]:
    """The rows of all candidates in all cells, with quality where options for it are given.

    out: JSON lines that the run goes on from; quality goes to a file beside it.
    """
    check_writable("--out", out)
    journal, candidates = Journal(out), candidates or benches.LocalCandidates()
    setting = replace(setting, quality=options and [*options.tasks, options.samples])
    refuse_mixed_texts([*journal, {"settings": setting.to_dict()}])  # before a long run
    facts = environment(torch.device(setting.device))
    load = functools.cache(setting.source.load)
    lengths = list(dict.fromkeys(cell.tokens for cell in cells))
    scores_out = None if out is None else out.with_suffix(".quality.jsonl")
    quality = options and functools.cache(
        partial(
            scores.measure, options, setting, candidates, load, names, lengths, facts, scores_out
        )
    )
    steps = [benches.rounds(cell.bench, setting, len(names)) for cell in cells]
    with progress.bar() as shown:
        task = progress.start(shown, sum(steps), "rounds")

        def on_cell(cell: Cell) -> None:
            shown.update(task, completed=sum(steps[: cells.index(cell) + 1]))

        measure = partial(benches.measure, setting, candidates, load, lambda _: shown.advance(task))
        rows = grid.fill(journal, cells, names, measure, setting, facts, quality, on_cell)
    say_if_nothing_was_measured(out, journal.added)
    return rows
