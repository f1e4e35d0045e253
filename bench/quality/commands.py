"""The command line of the evaluation: `kvpress eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.models import Source
from kvpress.bench.common.options import AsJson, ModelOptions, use_threads
from kvpress.bench.common.output import say_if_nothing_was_measured
from kvpress.bench.common.ranks import ParallelOptions, writes
from kvpress.bench.quality.options import (
    HarnessOptions,
    TaskOptions,
    metadata_of,
    refuse_idle,
    split_policies,
)
from kvpress.bench.shards.options import ShardOptions
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.quality.results import Cell, Results

console, errors = Console(), Console(stderr=True)
POLICIES = ["full"]


@command("kvpress eval --quick --policy full --policy snapkv:budget=0.2 --out quality.jsonl")
def evaluate(
    context: typer.Context,
    tasks: TaskOptions,
    harness: HarnessOptions,
    loading: ModelOptions,
    parts: ParallelOptions,
    sharing: ShardOptions,
    policy: Annotated[
        list[str],
        typer.Option(help="name:key=value,… or transformers-int4, …; repeat or join with commas."),
    ] = POLICIES,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Results as JSON lines; an interrupted run goes on from it.", show_default="none"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure quality beside bytes: what a model still knows of a context that was compressed.

    Answers are scored by teacher forcing, which equals greedy decoding where all tokens are right
    and decoding evicts nothing; --generate decodes them besides. Policies whose decode steps read
    some pages only (quest, leoam) are fed questions and answers token by token, since a pass of
    several tokens reads everything; what steps read stands beside what is held. Intervals are 95 %
    bootstraps over contexts; `vs full` pairs each context with the full cache.
    """
    from kvpress.bench.common.candidates import refuse_unknown

    from kvpress.policy.loading import parse

    refuse_idle(context)
    names = list(dict.fromkeys(split_policies(policy)))
    # lm-eval generates with policies alone. Wrong ones are refused before a model is loaded.
    check = parse if harness.lm_eval is not None else refuse_unknown
    for name in names:
        check(name)
    use_threads(loading.threads)
    sharing.check(parts, loading.device_map)
    source = loading.source if sharing.shared else parts.divided(loading.source)
    if harness.lm_eval is not None:
        results = with_lm_eval(source, names, harness.lm_eval.split(","), harness, out)
    else:
        results = with_our_tasks(source, names, tasks, out, sharing, loading.threads)
    if sharing.shards and not writes():
        return
    show(results, as_json)
    say_if_nothing_was_measured(out, results.added)


def with_our_tasks(
    source: Source,
    names: Sequence[str],
    tasks: TaskOptions,
    out: Path | None,
    sharing: ShardOptions,
    threads: int | None,
) -> Results:
    """Runs our suites, or the tasks in files, with every policy."""
    from kvpress.bench.quality import worker
    from kvpress.bench.quality.fill import fill_by
    from kvpress.bench.quality.results import Results
    from kvpress.bench.shards.teams import team

    load = worker.prepared(source, names, tasks)
    apart = partial(worker.begun, source, names, tasks)
    with team(sharing, source, threads, load, apart) as shared:
        results = Results(*shared.head, out if writes() else None)
        fill_by(shared, results)
    return results


def with_lm_eval(
    source: Source,
    names: Sequence[str],
    tasks: Sequence[str],
    given: HarnessOptions,
    out: Path | None,
) -> Results:
    """Runs tasks of lm-eval with every policy, and says what each is as it comes."""
    from kvpress.bench.quality import standard, standard_table

    metadata = metadata_of(given.metadata)
    how = standard.LmEvalOptions(
        given.task_folder, given.limit, metadata, given.chat, given.max_new_tokens
    )
    standard.require()
    loaded, tokenizer, results = begin(source, out, lm_eval=how.settings)

    def on_cell(cell: Cell) -> None:
        for line in standard_table.lines(cell):
            errors.print(*line, sep="  ", markup=False, highlight=False)

    standard.fill(results, loaded, tokenizer, names, tasks, how, on_cell)
    return results


def begin(source: Source, out: Path | None, **settings: Any) -> tuple[Any, Any, Results]:
    """The model, its tokenizer, and results that go on from a file. Raises ResultsError."""
    from kvpress.bench.quality.results import Results
    from kvpress.bench.quality.worker import head_of

    with errors.status(f"Loading {source.name} …"):
        loaded, tokenizer = source.load()
    return loaded, tokenizer, Results(*head_of(source, loaded, **settings), out)


def show(results: Results, as_json: bool) -> None:
    """Prints the tables, or the cells."""
    from kvpress.bench.common.report import table
    from kvpress.bench.quality.report import parts

    if as_json:
        sys.stdout.write(json.dumps([asdict(cell) for cell in results], indent=2) + "\n")
        return
    for sheets, legend in parts(results):
        for made in sheets:
            console.print(table(made))
        console.print(legend)
