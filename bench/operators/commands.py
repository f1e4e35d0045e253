"""The command line of the operators: `kvpress bench ops`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


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
    """Check the operators against their references, then time them beside their baselines.

    Each round runs every candidate of a case once. The probe is a plain read of the bytes that the
    operator must move, or a matrix product of as many operations. Operators whose results are wrong
    are not timed.
    """
    import torch
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.figures import require
    from kvpress.bench.common.options import chosen_device
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.operators import cases, record, registry
    from kvpress.bench.operators import plot as plots
    from kvpress.bench.operators.measure import time_cases

    where = chosen_device(device)
    for option, path in (("--out", out), ("--plot", plot)):
        check_writable(option, path)
    if plot is not None:
        require()
    chosen = registry.select(cases.cases(quick=quick, long=long), case or [])
    if threads:
        torch.set_num_threads(threads)
    facts = environment(where)
    outcomes = time_cases(chosen, where, rounds, warmup)
    console.print(record.table(outcomes, facts))
    settings = {"rounds": rounds, "warmup": warmup, "quick": quick, "long": long}
    results = record.to_record(outcomes, facts, settings)
    if out is not None:
        write_json(out, results)
    if plot is not None:
        plots.plot(results, plot)
    if any(outcome.refused is not None for outcome in outcomes):
        raise typer.Exit(1)
