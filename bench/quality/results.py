"""What an evaluation leaves behind: JSON lines, one per finished cell, from which it can go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvpress.bench.common.journal import JournalError, append, drop_broken_line, read
from kvpress.bench.quality.tasks import TASKS, Metric

from kvpress.errors import KVPressError

FORMAT = 1


class ResultsError(KVPressError, ValueError):
    """A results file that cannot be read, written, or gone on with."""


@dataclass(frozen=True)
class Cell:
    """One sample of one task under one policy and protocol.

    scores: of the questions, as dictionaries of `metrics.Score` and the label; where answers were
    generated, also `said`, `generated_exact` and `generated_tokens`. bytes: after the context was
    read, before the first question; bytes_bf16: of a full cache in bfloat16, 0: not known. metric,
    asks: those of the task. ratio: the compression that was asked for. leaks: of a secret, for
    every prompt that asks for it. reads: what `common.reads.StepReads` says, where steps read some
    pages only.

    A task of lm-eval is one cell: scores are its numbers, bytes those at the end of all documents
    together, longest the tokens of the longest.
    """

    task: str
    tokens: int
    index: int
    protocol: str
    policy: str
    scores: list[dict[str, Any]] = field(default_factory=list)
    depth: float | None = None
    bytes_held: int = 0
    bytes_full: int = 0
    seconds: float = 0.0
    error: str | None = None
    metric: Metric = "exact"
    asks: bool = True
    longest: int = 0
    ratio: float | None = None
    bytes_bf16: int = 0
    leaks: list[dict[str, Any]] = field(default_factory=list)
    reads: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, int, int, str, str]:
        """What tells cells apart."""
        return self.task, self.tokens, self.index, self.protocol, self.policy


class Results:
    """Cells in memory and, with a path, on disk as soon as they are finished.

    A file that exists is gone on with: its cells are kept, those that failed are run again. Raises
    ResultsError if it was made with other settings.
    """

    def __init__(
        self, settings: dict[str, Any], environment: dict[str, Any], path: Path | None
    ) -> None:
        self.settings, self.environment, self._path = settings, environment, path
        self._cells: dict[tuple[Any, ...], Cell] = {}
        self.added = 0  # cells since it was opened
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._go_on(path)
        else:
            head = {"format": FORMAT, "settings": settings, "environment": environment}
            append(path, head)

    def _go_on(self, path: Path) -> None:
        before = load(path)
        old, new = before.settings, self.settings
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if changed:
            what = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in changed)
            raise ResultsError(
                f"{path} was made with other settings ({what}). Choose another --out, or remove the"
                " file."
            )
        self._cells = {cell.key: cell for cell in before if cell.error is None}
        drop_broken_line(path)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._cells

    def __iter__(self) -> Iterator[Cell]:
        yield from self._cells.values()

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, cell: Cell) -> None:
        """Keeps a finished cell."""
        self._cells[cell.key] = cell
        self.added += 1
        if self._path is not None:
            append(self._path, asdict(cell))


def load(path: Path) -> Results:
    """The results in a file; of several lines for one cell the last counts. Raises ResultsError."""
    try:
        whole = read(path)
        head, lines = whole[0], whole[1:]
        if head["format"] != FORMAT:
            raise ResultsError(f"{path} has format {head['format']}; this version reads {FORMAT}.")
        if any("settings" in line for line in lines):
            raise ResultsError(
                f"{path} holds several runs, whose settings and texts may differ. Keep each in a"
                " file of its own."
            )
        cells = [_cell(line) for line in lines]
        results = Results(head["settings"], head["environment"], None)
    except JournalError as error:
        raise ResultsError(f"{path} is no results file of `kvpress eval`: {error}") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path} is no results file of `kvpress eval`: {error}.") from error
    for cell in cells:
        results.add(cell)
    return results


def _cell(line: dict[str, Any]) -> Cell:
    """A cell; older ones do not say how their task is scored, and are of tasks of our own."""
    task = TASKS.get(line["task"])
    known = {} if task is None else {"metric": task.metric, "asks": task.asks}
    return Cell(**{**known, **line})
