"""The command line of the measurements: `kvpress bench ops`, `decode`, `overhead`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

bench = typer.Typer(help="Measure the operators and the engine.", no_args_is_help=True)
console, errors = Console(), Console(stderr=True)


@bench.command()
def ops(
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name contains this; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 2,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for a bar plot.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: does everything run?")] = False,
    long: Annotated[bool, typer.Option(help="Also prompts of 8,192 tokens.")] = False,
) -> None:
    """Check the operators against their references, then time them beside their rivals.

    Each round runs every candidate of a case once. The probe is a plain read of the bytes that the
    operator must move, or a matrix product of as many operations. Operators whose results are wrong
    are not timed.
    """
    import torch
    from kvpress.bench import operators, record, registry
    from kvpress.bench import plot as plots

    where = _device(device)
    for option, path in (("--out", out), ("--plot", plot)):
        _writable(option, path)
    if plot is not None:
        plots.require()
    chosen = registry.select(operators.cases(quick=quick, long=long), case or [])
    if threads:
        torch.set_num_threads(threads)
    facts = record.environment(where)
    outcomes = _measure(chosen, where, rounds, warmup)
    console.print(record.table(outcomes, facts))
    settings = {"rounds": rounds, "warmup": warmup, "quick": quick, "long": long}
    results = record.to_record(outcomes, facts, settings)
    if out is not None:
        record.write_json(out, results)
    if plot is not None:
        plots.plot(results, plot)
    if any(outcome.refused is not None for outcome in outcomes):
        raise typer.Exit(1)


@bench.command()
def decode(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=64)] = 8000,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of one token.", min=1)] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 2,
    cache_dtype: Annotated[str | None, typer.Option(help="Storage of keys and values.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
) -> None:
    """Time decode steps after a long prompt, beside transformers' DynamicCache with SDPA."""
    import torch
    from kvpress.bench import decode as decoding
    from kvpress.bench import models, prompt, record

    if cache_dtype is not None and cache_dtype not in models.DTYPES:
        raise typer.BadParameter(f"--cache-dtype {cache_dtype}: allowed: {list(models.DTYPES)}.")
    _writable("--out", out)
    loaded, tokenizer = models.load(model)
    text = prompt.reference_prompt(tokenizer, tokens)
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(loaded.device)
    rows = []
    for size in batch or [1]:
        with errors.status(f"batch {size}: reading {ids.shape[1]} tokens per candidate"):
            rows += decoding.measure(
                loaded,
                ids,
                policy or ["full", "keyformer:budget=0.5", "keyformer:budget=0.2"],
                size,
                rounds,
                warmup,
                models.DTYPES[cache_dtype] if cache_dtype else None,
            )
    console.print(decoding.table(rows))
    if out is not None:
        facts = record.environment(torch.device(loaded.device.type))
        settings = {"rounds": rounds, "warmup": warmup, "cache_dtype": cache_dtype}
        results = {"format": record.FORMAT, "environment": facts, "settings": settings}
        record.write_json(out, {**results, "rows": [row.to_dict() for row in rows]})


@bench.command()
def overhead(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of 200 steps.", min=1)] = 7,
) -> None:
    """Time what the engine itself costs per layer and decode step, with a cache of one slot."""
    from kvpress.bench import models
    from kvpress.bench import overhead as costs
    from rich.table import Table

    loaded, _ = models.load(model)
    chosen = policy or ["streaming_llm:budget=1,sink=0", "h2o:budget=1", "keyformer:budget=1"]
    table = Table(title="Per layer and decode step", title_justify="left")
    for title in ("policy", "median µs", "low–high µs"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for name, taken in costs.measure(loaded, chosen, rounds, warmup=1).items():
        spread = f"{taken.low * 1e6:.1f}–{taken.high * 1e6:.1f}"
        table.add_row(name, f"{taken.median * 1e6:.1f}", spread)
    console.print(table)


def _measure(cases: list[Any], device: Any, rounds: int, warmup: int) -> list[Any]:
    """The outcome of every case, with a progress bar on a terminal."""
    from kvpress.bench.registry import measure
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    outcomes = []
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(cases) * (rounds + warmup))
        for number, case in enumerate(cases):
            progress.update(task, description=case.title)
            outcomes.append(measure(case, device, rounds, warmup, lambda _: progress.advance(task)))
            # A case that was refused ran no round.
            progress.update(task, completed=(number + 1) * (rounds + warmup))
    return outcomes


def _device(name: str | None) -> Any:
    import torch

    found = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name} is unknown; allowed: cpu, cuda.")
    if name == "cuda" and not found:
        raise typer.BadParameter("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))


def _writable(option: str, path: Path | None) -> None:
    """Refuses a file whose folder is not there before a long run, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"{option} {path}: it must be a file in a folder that exists. Make the folder first."
        )
