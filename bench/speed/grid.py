"""A benchmark over lengths and batches: cells that the journal does not hold yet are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from kvpress.bench.common.journal import Journal, Row
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
    for cell in wanted:
        identities = {name: _identity(cell, name, setting, facts) for name in candidates}
        found = [journal.find(identity) for identity in identities.values()]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            scores = quality() if quality is not None else {}
            measured = measure(cell, candidates)
            known = [
                {
                    **identity,
                    **measured[name],
                    "quality": scores.get((name, cell.tokens), []),
                    "environment": dict(facts),
                }
                for name, identity in identities.items()
            ]
            for row in known:
                journal.add(row)
        rows += known
        on_cell(cell)
    return rows


def _identity(cell: Cell, name: str, setting: Setting, facts: Mapping[str, Any]) -> Row:
    """What tells rows apart: a row of another machine or with other settings is not this one."""
    return {
        **cell._asdict(),
        "candidate": name,
        "settings": setting.to_dict(),
        "machine": facts["device"] if facts["device"] != "cpu" else facts["cpu"],
    }
