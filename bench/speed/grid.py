"""A benchmark over lengths and batches: cells that the journal does not hold yet are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from kvpress.bench.common.environment import machine
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.shards.work import Head
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting

Measure = Callable[[Cell, Sequence[str]], Mapping[str, Row]]
Quality = Callable[[], Mapping[tuple[str, int], list[Row]]]  # by candidate and tokens


def cells(bench: str, lengths: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """Every length with every batch."""
    return [Cell(bench, tokens, batch) for tokens, batch in product(lengths, batches)]


def fill(
    journal: Journal,
    wanted: Sequence[Cell],
    candidates: Sequence[str],
    measure: Measure,
    setting: Setting,
    facts: Mapping[str, Any],
    quality: Quality | None = None,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> list[Row]:
    """The rows of all cells. The candidates of a cell are measured together, or not at all.

    facts: the environment, see `common.environment`. quality: what rows get besides; measured only
    when a cell is measured. A cell of which the journal lacks a row, or holds one with an error, is
    measured again, so that its ratios are of one run.
    """
    rows = []
    head = Head(setting.to_dict(), dict(facts))
    for cell in wanted:
        known = find(journal, cell, candidates, head)
        if known is None:
            scores = quality() if quality is not None else {}
            known = made(cell, measure(cell, candidates), head, scores)
            for row in known:
                journal.add(row)
        rows += known
        on_cell(cell)
    return rows


def find(journal: Journal, cell: Cell, candidates: Sequence[str], head: Head) -> list[Row] | None:
    """The rows of a cell that the journal holds, if it holds all of them."""
    found = [journal.find(_identity(cell, name, head)) for name in candidates]
    known = [row for row in found if row is not None]
    return known if len(known) == len(found) else None


def made(
    cell: Cell,
    measured: Mapping[str, Row],
    head: Head,
    scores: Mapping[tuple[str, int], list[Row]],
) -> list[Row]:
    """Rows of what was measured, by candidate; scores: see `Quality`."""
    return [
        {
            **_identity(cell, name, head),
            **row,
            "quality": scores.get((name, cell.tokens), []),
            "environment": dict(head.environment),
        }
        for name, row in measured.items()
    ]


def _identity(cell: Cell, name: str, head: Head) -> Row:
    """What tells rows apart: a row of another machine or with other settings is not this one."""
    return {
        **cell._asdict(),
        "candidate": name,
        "settings": head.settings,
        "machine": machine(head.environment),
    }
