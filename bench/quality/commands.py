"""The command line of the evaluation: `kvpress eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.quality.options import metadata_of, refuse_idle, split_policies
from rich.console import Console

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
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")] = "demo",
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
        typer.Option(help="A text for the contexts (default: Python's reference)."),
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
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Results as JSON lines; an interrupted run goes on from it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Measure quality beside bytes: what a model still knows of a context that was compressed.

    Answers are scored by teacher forcing, which equals greedy decoding where all tokens are right.
    Intervals are 95 % bootstraps over contexts; `vs full` pairs each context with the full cache.
    """
    import torch
    from kvpress.bench import models, record
    from kvpress.bench.candidates import refuse_unknown
    from kvpress.bench.quality import run
    from kvpress.bench.quality.fill import fill
    from kvpress.bench.quality.results import Results
    from kvpress.bench.quality.sample import Writer, read_text
    from kvpress.bench.quality.subject import InProcess

    from kvpress.loading import parse

    refuse_idle(context)
    names = list(dict.fromkeys(split_policies(policy or [run.FULL])))
    check = (
        parse if lm_eval is not None else refuse_unknown
    )  # lm-eval generates with policies alone
    for name in names:
        check(name)  # before a model is loaded
    if threads:
        torch.set_num_threads(threads)
    if lm_eval is not None:
        more, tasks = metadata_of(metadata), lm_eval.split(",")
        with_lm_eval(tasks, names, model, dtype, device, task_folder, limit, more, as_json)
        return
    plans_for = planned(files, suite or (), protocol, quick, length or (), samples)
    source = None if text is None else read_text(text)
    with errors.status(f"Loading {model} …"):
        loaded, tokenizer = models.load(model, dtype, device)
    settings = {
        "model": model,
        "dtype": dtype,
        "text": None if text is None else str(text),
        "files": None if files is None else str(files),
        "seed": seed,
        "stepwise": stepwise,
    }
    plans = plans_for(loaded)
    results = Results(settings, record.environment(loaded.device), out)
    subject_of = partial(InProcess, loaded)
    fill(results, names, subject_of, Writer(tokenizer, source), plans, seed, stepwise)
    show(results, as_json)


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


def show(results: Any, as_json: bool) -> None:
    """Prints the tables, or the cells."""
    from kvpress.bench.quality import table

    if as_json:
        sys.stdout.write(json.dumps([asdict(cell) for cell in results], indent=2) + "\n")
        return
    for made in table.tables(results):
        console.print(made)
    console.print(table.LEGEND)


def with_lm_eval(
    tasks: Sequence[str],
    policies: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    folder: Path | None,
    limit: int | None,
    metadata: dict[str, Any],
    as_json: bool,
) -> None:
    """Runs tasks of lm-eval with every policy. Raises HarnessError."""
    from kvpress.bench import models
    from kvpress.bench.quality.standard import rows, table

    loaded, tokenizer = models.load(model, dtype, device)
    made = rows(loaded, tokenizer, policies, tasks, folder, limit, metadata)
    if as_json:
        sys.stdout.write(json.dumps([row._asdict() for row in made], indent=2) + "\n")
    else:
        console.print(table(made))
