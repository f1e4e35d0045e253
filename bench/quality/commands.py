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
from kvpress.bench.common import options
from kvpress.bench.common.models import Source
from kvpress.bench.quality.options import metadata_of, refuse_idle, split_policies
from rich.console import Console

from kvpress.report.tables import Fitted

if TYPE_CHECKING:
    from kvpress.bench.quality.results import Cell, Results
    from kvpress.bench.quality.standard import LmEvalOptions

console, errors = Console(), Console(stderr=True)


def evaluate(
    context: typer.Context,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="offline, a task, or a name in --files; repeat or join with commas."),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(help="A folder of JSON files with prompts and answers, as MiniLongBench's."),
    ] = None,
    model: options.Model = "demo",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="name:key=value,… or transformers-int4, …; repeat or join with commas."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Is the question known while compressing? hidden, visible, or both.")
    ] = "both",
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts, few samples.")] = False,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a context, with --files at most; repeatable.", min=128),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Contexts per length.", min=1)] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text for the contexts (default: Python's language reference)."),
    ] = None,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="Feed answers token by token, as when decoding.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead, joined with commas.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Where lm-eval finds tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task of lm-eval.", min=1)] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="JSON for lm-eval's tasks: '{\"max_seq_lengths\": [4096]}' for ruler."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts of lm-eval through the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of lm-eval's answers, instead of the task's limit.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Results as JSON lines; an interrupted run goes on from it.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Measure quality beside bytes: what a model still knows of a context that was compressed.

    Answers are scored by teacher forcing, which equals greedy decoding where all tokens are right.
    Intervals are 95 % bootstraps over contexts; `vs full` pairs each context with the full cache.
    """
    import torch
    from kvpress.bench.common.candidates import refuse_unknown
    from kvpress.bench.quality.run import FULL
    from kvpress.bench.quality.standard import LmEvalOptions

    from kvpress.policy.loading import parse

    refuse_idle(context)
    names = list(dict.fromkeys(split_policies(policy or [FULL])))
    # lm-eval generates with policies alone. Wrong ones are refused before a model is loaded.
    check = parse if lm_eval is not None else refuse_unknown
    for name in names:
        check(name)
    if threads:
        torch.set_num_threads(threads)
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    if lm_eval is not None:
        how = LmEvalOptions(task_folder, limit, metadata_of(metadata), chat, max_new_tokens)
        results = with_lm_eval(source, names, lm_eval.split(","), how, out)
    else:
        plans_for = planned(files, suite or (), protocol, quick, length or (), samples)
        results = with_our_tasks(source, names, plans_for, text, files, seed, stepwise, out)
    show(results, as_json)


def with_our_tasks(
    source: Source,
    names: Sequence[str],
    plans_for: Callable[[Any], list[Any]],
    text: Path | None,
    files: Path | None,
    seed: int,
    stepwise: bool,
    out: Path | None,
) -> Results:
    """Runs our suites, or the tasks in files, with every policy."""
    from kvpress.bench.common.text import default_text, read_text
    from kvpress.bench.quality import files as from_files
    from kvpress.bench.quality.fill import fill
    from kvpress.bench.quality.sample import Writer
    from kvpress.bench.quality.system import LocalSystem

    taken = default_text() if text is None else read_text(text)
    loaded, tokenizer, results = begin(
        source,
        out,
        text=taken.to_dict() if files is None else None,
        files=None if files is None else from_files.identity(files),
        seed=seed,
        stepwise=stepwise,
    )
    writer = Writer(tokenizer, taken.content)
    fill(results, names, partial(LocalSystem, loaded), writer, plans_for(loaded), seed, stepwise)
    return results


def with_lm_eval(
    source: Source, names: Sequence[str], tasks: Sequence[str], how: LmEvalOptions, out: Path | None
) -> Results:
    """Runs tasks of lm-eval with every policy, and says what each is as it comes."""
    from kvpress.bench.quality import standard, standard_table

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


def planned(
    folder: Path | None,
    suites: Sequence[str],
    protocol: str,
    quick: bool,
    lengths: Sequence[int],
    samples: int | None,
) -> Callable[[Any], list[Any]]:
    """What is to be run on a model. Raises what can be known before there is one."""
    from kvpress.bench.quality import files
    from kvpress.bench.quality import suites as ours

    names = [name for given in suites for name in given.split(",")]
    protocols = ours.PROTOCOLS if protocol == "both" else (protocol,)
    if folder is None:
        plans = ours.plans(names or [ours.OFFLINE], protocols, quick, lengths, samples)
        return lambda model: plans
    entries = files.read(folder, names, protocols)
    return lambda model: files.plans(entries, lengths, samples, files.positions(model))


def show(results: Results, as_json: bool) -> None:
    """Prints the tables, or the cells."""
    from kvpress.bench.quality import standard_table, table

    if as_json:
        sys.stdout.write(json.dumps([asdict(cell) for cell in results], indent=2) + "\n")
        return
    ours, other = list(table.tables(results)), standard_table.sheet(results)
    for made in ours:
        console.print(Fitted(made))
    if ours:
        console.print(table.LEGEND)
    if other is not None:
        console.print(Fitted(standard_table.table(other)))
        console.print(standard_table.LEGEND)
