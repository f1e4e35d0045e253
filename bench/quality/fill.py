"""Results filled cell by cell, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpress.bench.progress import bar
from kvpress.bench.quality import run
from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.sample import Writer
from kvpress.bench.quality.subject import Subject
from kvpress.bench.quality.suites import Plan


def fill(
    results: Results,
    names: Sequence[str],
    subject_of: Callable[[str], Subject],
    writer: Writer,
    plans: Sequence[Plan],
    seed: int = 0,
    stepwise: bool = False,
) -> None:
    """Runs the cells that the results do not hold yet; the full cache is asked in any case."""
    subjects = {name: subject_of(name) for name in names}
    reference = subjects.get(run.FULL) or subject_of(run.FULL)
    with bar() as shown:
        total = sum(plan.samples for plan in plans) * (len(subjects) + 1)
        task = shown.add_task("", total=total)

        def on_cell(cell: Cell) -> None:
            shown.update(task, advance=1, description=f"{cell.task} {cell.tokens} {cell.policy}")

        judged = list(subjects.values())
        run.evaluate(reference, judged, writer, plans, results, seed, stepwise, on_cell)
