"""The command line of the measurements: `kvpress bench ops`, `overhead`, and those of `speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.peers.commands import peers
from kvpress.bench.sparse.commands import sparse
from kvpress.bench.speed import commands as speed
from rich.console import Console

from kvpress.tables import Fitted

bench = typer.Typer(help="Measure the operators and the engine.", no_args_is_help=True)
console = Console()
for command in (speed.decode, speed.prefill, speed.throughput, speed.memory, peers, sparse):
    bench.command()(command)


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
    from kvpress.bench import operators, progress, record, registry
    from kvpress.bench import plot as plots

    where = chosen_device(device)
    for option, path in (("--out", out), ("--plot", plot)):
        check_writable(option, path)
    if plot is not None:
        plots.require()
    chosen = registry.select(operators.cases(quick=quick, long=long), case or [])
    if threads:
        torch.set_num_threads(threads)
    facts = record.environment(where)
    outcomes = progress.time_cases(chosen, where, rounds, warmup)
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
def overhead(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of all layers.", min=1)] = 1000,
) -> None:
    """Time what the engine itself costs per layer and decode step, with a cache of one slot."""
    from kvpress.bench import models
    from kvpress.bench import overhead as costs
    from rich.table import Table

    loaded, _ = models.load(model)
    chosen = policy or ["streaming_llm:budget=1,sink=0", "h2o:budget=1", "keyformer:budget=1"]
    table = Table(title="Per layer and decode step", title_justify="left")
    for title in ("policy", "median µs", "quartiles µs", "low–high µs"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for name, taken in costs.measure(loaded, chosen, rounds, warmup=20).items():
        ranges = taken.quartiles, (taken.low, taken.high)
        spreads = (f"{a * 1e6:.1f}–{b * 1e6:.1f}" for a, b in ranges)
        table.add_row(name, f"{taken.median * 1e6:.1f}", *spreads)
    console.print(Fitted(table))


def chosen_device(name: str | None) -> Any:
    """The torch.device of an option; without one a GPU if there is one. Raises BadParameter."""
    import torch

    found = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name} is unknown; allowed: cpu, cuda.")
    if name == "cuda" and not found:
        raise typer.BadParameter("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file whose folder is not there before a long run, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"{option} {path}: it must be a file in a folder that exists. Make the folder first."
        )
