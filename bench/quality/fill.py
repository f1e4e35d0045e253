"""Results filled cell by cell, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpress.bench.common.progress import bar
from kvpress.bench.quality import run
from kvpress.bench.quality.reading import PLAIN, How
from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.sample import Writer
from kvpress.bench.quality.suites import Plan
from kvpress.bench.quality.system import System
from kvpress.bench.shards.work import NO_HEAD, Alone, Head, Team


def fill(
    results: Results,
    names: Sequence[str],
    system_of: Callable[[str], System],
    writer: Writer,
    plans: Sequence[Plan],
    how: How = PLAIN,
) -> None:
    """Runs the cells that the results do not hold yet; the full cache is asked in any case."""
    fill_by(Alone(contexts(names, system_of, writer, plans, how)), results)


def fill_by(team: Team, results: Results) -> None:
    """The same by one process or several."""
    with bar() as shown:
        task = shown.add_task("", total=sum(map(len, team.units)))

        def on_cell(cell: Cell) -> None:
            shown.update(task, advance=1, description=f"{cell.task} {cell.tokens} {cell.policy}")

        run.complete(team, results, on_cell)


def contexts(
    names: Sequence[str],
    system_of: Callable[[str], System],
    writer: Writer,
    plans: Sequence[Plan],
    how: How = PLAIN,
    head: Head = NO_HEAD,
) -> run.Contexts:
    """The work: every policy on every context, beside the full cache."""
    systems = {name: system_of(name) for name in names}
    reference = systems.get(run.FULL) or system_of(run.FULL)
    return run.Contexts(reference, list(systems.values()), writer, plans, how, head)
