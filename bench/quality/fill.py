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


def fill(
    results: Results,
    names: Sequence[str],
    system_of: Callable[[str], System],
    writer: Writer,
    plans: Sequence[Plan],
    how: How = PLAIN,
) -> None:
    """Runs the cells that the results do not hold yet; the full cache is asked in any case."""
    systems = {name: system_of(name) for name in names}
    reference = systems.get(run.FULL) or system_of(run.FULL)
    with bar() as shown:
        total = sum(plan.samples for plan in plans) * (len(systems) + 1)
        task = shown.add_task("", total=total)

        def on_cell(cell: Cell) -> None:
            shown.update(task, advance=1, description=f"{cell.task} {cell.tokens} {cell.policy}")

        run.evaluate(reference, list(systems.values()), writer, plans, results, how, on_cell)
