"""Quality for the rows of a speed benchmark: the same candidates at the same lengths, in brief."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvpress.bench.common.journal import Row
from kvpress.bench.quality import suites, table
from kvpress.bench.quality.fill import fill
from kvpress.bench.quality.results import Results
from kvpress.bench.quality.sample import Writer
from kvpress.bench.speed.benches import Candidates, Load
from kvpress.bench.speed.setting import Setting


class QualityOptions(NamedTuple):
    """Tasks, with the question hidden while compressing, about so many contexts."""

    tasks: tuple[str, ...] = ("copy",)  # solved by models of all sizes, at all lengths
    samples: int = 4


def measure(
    options: QualityOptions,
    setting: Setting,
    candidates: Candidates,
    load: Load,
    names: Sequence[str],
    lengths: Sequence[int],
    facts: dict[str, Any],
    path: Path | None,
) -> dict[tuple[str, int], list[Row]]:
    """The score of every task with its interval, by candidate and length.

    path: of a results file as `kvpress eval` makes them, from which an interrupted run goes on.
    """
    model, tokenizer = load()
    settings = {"model": setting.model, "dtype": setting.dtype, "text": setting.text}
    results = Results(settings, facts, path)
    plans = suites.plans(options.tasks, [suites.HIDDEN], lengths=lengths, samples=options.samples)
    fill(results, names, partial(candidates.system, model), Writer(tokenizer), plans)
    found: dict[tuple[str, int], list[Row]] = {}
    for block in table.blocks(results):
        for line in block.lines:
            found.setdefault((line.policy, block.tokens), []).append(_row(block, line))
    return found


def _row(block: table.Block, line: table.Line) -> Row:
    """One task. The score is None where it failed."""
    score = line.score
    return {
        "task": block.task,
        "score": score and score.mean,
        "low": score and score.low,
        "high": score and score.high,
        "samples": score and score.samples,
        "nll": line.nll and line.nll.mean,
        "kl": line.kl,
        "agreement": line.agreement,
        "errors": list(line.errors),
    }
