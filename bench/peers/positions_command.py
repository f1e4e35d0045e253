"""The command line of the comparison of kept positions: `kvpress bench positions`."""

from __future__ import annotations

from typing import Annotated

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import HubOptions
from kvpress.bench.speed import options
from kvpress.bench.speed.commands import make_setting
from rich.console import Console

console = Console()
BUDGETS = ["0.25", "0.5"]


@command("kvpress bench positions --budget 0.25 --contexts 5 --out positions.jsonl")
def positions(
    loading: HubOptions,
    budget: Annotated[
        list[str], typer.Option(help="A fraction of the tokens; repeat for each of several.")
    ] = BUDGETS,
    tokens: Annotated[int, typer.Option(help="Of a prompt.", min=128)] = 1000,
    texts: Annotated[int, typer.Option(help="Prompts that every pair reads.", min=1)] = 1,
    contexts: Annotated[
        int, typer.Option(help="Contexts per task, for the tokens that are right.", min=0)
    ] = 0,
    out: options.Out = None,
) -> None:
    """Compare which positions policies keep with those that NVIDIA's kvpress keeps.

    The same model and prompts, by layer and KV head. A policy stands beside the press that it comes
    nearest to; where the two differ by what they are, a further line has that difference switched
    off on both sides. `scripts/peers positions` installs the other.
    """
    from kvpress.bench.common import report
    from kvpress.bench.peers import agreement_table, positions, remote

    setting = make_setting(loading, None, 1, 0)
    remote.environment()  # refuse before a long run, not in it
    rows, scores = positions.run(setting, budget, tokens, texts, contexts, out)
    console.print(report.table(agreement_table.sheet(rows, scores)))
    console.print(agreement_table.LEGEND)
