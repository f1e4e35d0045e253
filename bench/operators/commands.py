"""The command line of the operators: `kvpress bench ops`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import GPU, Threads, chosen_device, use_threads
from rich.console import Console

console = Console()


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go."""

    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None
    plot: Annotated[
        Path | None, typer.Option(help="A PNG file for a bar plot.", show_default="none")
    ] = None

    def check(self) -> None:
        """Raises BadParameter or PlotError before a long run, not after it."""
        from kvpress.bench.common.figures import require
        from kvpress.bench.common.output import check_writable

        for option, path in (("--out", self.out), ("--plot", self.plot)):
            check_writable(option, path)
        if self.plot is not None:
            require()


@command("kvpress bench ops --case decode_rows --plot ops.png")
def ops(
    files: OutputOptions,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Only cases whose name contains this; repeatable.", show_default="all"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 2,
    threads: Threads = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=GPU)] = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: does everything run?")] = False,
    long: Annotated[bool, typer.Option(help="Also prompts of 8,192 tokens.")] = False,
) -> None:
    """Check the operators against their references, then time them beside their baselines.

    Each round runs every candidate of a case once. The probe is a plain read of the bytes that the
    operator must move, or a matrix product of as many operations. Operators whose results are wrong
    are not timed.
    """
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import write_json
    from kvpress.bench.operators import cases, record, registry
    from kvpress.bench.operators import plot as plots
    from kvpress.bench.operators.measure import time_cases

    where = chosen_device(device)
    files.check()
    chosen = registry.select(cases.cases(quick=quick, long=long), case or [])
    use_threads(threads)
    facts = environment(where)
    outcomes = time_cases(chosen, where, rounds, warmup)
    console.print(record.table(outcomes, facts))
    settings = {"rounds": rounds, "warmup": warmup, "quick": quick, "long": long}
    results = record.to_record(outcomes, facts, settings)
    if files.out is not None:
        write_json(files.out, results)
    if files.plot is not None:
        plots.plot(results, files.plot)
    if any(outcome.refused is not None for outcome in outcomes):
        raise typer.Exit(1)
