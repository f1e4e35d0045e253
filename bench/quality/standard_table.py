"""The table of tasks of lm-eval: one line per metric and policy, with the bytes held."""

from __future__ import annotations

from collections.abc import Iterable

from kvpress.bench.common.report import Sheet
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.run import FULL
from kvpress.bench.quality.tasks import LM_EVAL

HEAD = ("task", "metric", "policy", "kept", "value", "± error", "documents", "longest")
LEGEND = (
    "kept: bytes held at the end of every document, of those of the full cache, all documents"
    " together. ± error: the standard error that lm-eval gives. longest: tokens of the longest"
    " document with its answer."
)
_ALL = 0.99  # of the bytes: a policy that holds no less than this has left nothing out


def sheet(cells: Iterable[Cell]) -> Sheet | None:
    """The table in texts, by task and metric; None without such cells."""
    chosen = [cell for cell in cells if cell.metric == LM_EVAL]
    if not chosen:
        return None
    grouped: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for cell in chosen:
        for line in lines(cell):
            grouped.setdefault(line[:2], []).append(line)
    ordered = tuple(line for same in grouped.values() for line in same)
    title = "lm-eval, question visible while compressing"
    return Sheet(
        title, HEAD, ordered, tuple(note for cell in chosen for note in _notes(cell)), labels=3
    )


def lines(cell: Cell) -> list[tuple[str, ...]]:
    """The texts of a cell under `HEAD`, a line per number."""
    kept = "–" if not cell.bytes_full else f"{cell.bytes_held / cell.bytes_full:.1%}"
    if cell.error is not None:
        return [(cell.task, "–", cell.policy, "–", "failed", "–", "–", "–")]
    return [
        (
            score["task"],
            score["label"],
            cell.policy,
            kept,
            f"{score['value']:.4f}",
            "–" if score["error"] is None else f"{score['error']:.4f}",
            "–" if score["documents"] is None else str(score["documents"]),
            f"{cell.longest:,}",
        )
        for score in cell.scores
    ]


def _notes(cell: Cell) -> list[str]:
    """What failed, and where a policy had nothing to leave out."""
    if cell.error is not None:
        return [f"{cell.policy}, {cell.task}: {cell.error}"]
    if cell.policy != FULL and cell.bytes_held >= _ALL * cell.bytes_full > 0:
        return [
            f"{cell.policy}, {cell.task}: holds as many bytes as the full cache; its longest"
            f" document has {cell.longest:,} tokens."
        ]
    return []
