"""The command line of the evaluation: `kvpress eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.models import Source
from kvpress.bench.common.options import AsJson, ModelOptions, use_threads
from kvpress.bench.common.output import say_if_nothing_was_measured
from kvpress.bench.common.ranks import ParallelOptions
from kvpress.bench.quality.options import (
    HarnessOptions,
    TaskOptions,
    metadata_of,
    refuse_idle,
    split_policies,
    stored_as,
)
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
    source = parts.divided(loading.source)
    if harness.lm_eval is not None:
        results = with_lm_eval(source, names, harness.lm_eval.split(","), harness, out)
    else:
        results = with_our_tasks(source, names, tasks, out)
    show(results, as_json)
    say_if_nothing_was_measured(out, results.added)


def with_our_tasks(
    source: Source, names: Sequence[str], tasks: TaskOptions, out: Path | None
) -> Results:
    """Runs our suites, or the tasks in files, with every policy."""
    from kvpress.bench.common.text import default_text, read_text
    from kvpress.bench.quality import files, ratios
    from kvpress.bench.quality.fill import fill
    from kvpress.bench.quality.reading import How
    from kvpress.bench.quality.sample import Writer
    from kvpress.bench.quality.system import LocalSystem

    tasks.check()
    asked = ratios.at_ratios(names, ratios.numbers(tasks.ratio or ()))
    dtype, plans_for = stored_as(tasks.cache_dtype, asked), planned(tasks)
    taken = default_text() if tasks.text is None else read_text(tasks.text)
    loaded, tokenizer, results = begin(
        source,
        out,
        text=taken.to_dict() if tasks.files is None else None,
        files=None if tasks.files is None else files.identity(tasks.files),
        seed=tasks.seed,
        stepwise=tasks.stepwise,
        generate=tasks.generate or None,  # not named where not asked for, as in older files
        cache_dtype=tasks.cache_dtype,
        protect_system=tasks.protect_system or None,
    )
    writer, plans = Writer(tokenizer, taken.content), plans_for(loaded)
    how = How(tasks.seed, tasks.stepwise, tasks.generate, asked)
    systems = partial(LocalSystem, loaded, cache_dtype=dtype, protects=tasks.protect_system)
    fill(results, list(asked), systems, writer, plans, how)
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
    from kvpress.bench.common.environment import environment
    from kvpress.bench.quality.results import Results

    with errors.status(f"Loading {source.name} …"):
        loaded, tokenizer = source.load()
    dtype = str(loaded.dtype).removeprefix("torch.")
    head = {"model": source.name, "dtype": dtype, **source.load_options, **settings}
    return loaded, tokenizer, Results(head, environment(loaded.device), out)


def planned(tasks: TaskOptions) -> Callable[[Any], list[Any]]:
    """What is to be run on a model. Raises what can be known before there is one."""
    from kvpress.bench.quality import files, suites

    lengths, samples = tasks.length or (), tasks.samples
    protocols = suites.PROTOCOLS if tasks.protocol == "both" else (tasks.protocol,)
    if tasks.files is None:
        names = tasks.names or [suites.OFFLINE]
        plans = suites.plans(names, protocols, tasks.quick, lengths, samples)
        return lambda model: plans
    entries = files.read(tasks.files, tasks.names, protocols)
    return lambda model: files.plans(entries, lengths, samples, files.positions(model))


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
