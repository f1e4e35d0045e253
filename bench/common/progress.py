"""Progress of measurements on a terminal (stderr)."""

from __future__ import annotations

from kvpress.bench.common.ranks import writes
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_STDERR = Console(stderr=True)
_LONGEST = 24 * 3600.0  # seconds that the estimate of the remaining time looks back


def bar() -> Progress:
    """A bar with the number of what is done and the time that is left, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=_STDERR,
        disable=not (_STDERR.is_terminal and writes()),
        # By default only the last 30 seconds count, in which no round of a long prompt may end.
        speed_estimate_period=_LONGEST,
    )


def start(shown: Progress, total: int, description: str = "") -> TaskID:
    """A task that has just begun."""
    task = shown.add_task(description, total=total)
    shown.advance(task, 0)  # the start of the first round, from which the estimate counts
    return task
