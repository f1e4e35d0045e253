"""A grid whose cells actors share: the candidates of a cell are timed by one, side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from kvpress.bench.common import progress
from kvpress.bench.common.environment import environment
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.common.output import check_writable, say_if_nothing_was_measured
from kvpress.bench.shards.errors import ShardError
from kvpress.bench.shards.work import Head, Team, Unit, in_order
from kvpress.bench.speed import benches, grid
from kvpress.bench.speed.rows import Cell, refuse_mixed_texts
from kvpress.bench.speed.setting import Setting


class Cells:
    """The work: a unit is a cell, and its one part the rows of all candidates."""

    def __init__(self, setting: Setting, cells: Sequence[Cell], names: Sequence[str]) -> None:
        self.head = Head(setting.to_dict(), environment(torch.device(setting.device)))
        self.units = [[cell] for cell in cells]
        load = functools.cache(setting.source.load)
        local = benches.LocalCandidates()
        self._measure = partial(benches.measure, setting, local, load, lambda _: None)
        self._names = names

    def do(self, unit: int, parts: Sequence[int]) -> Iterator[list[Row]]:
        """The rows of a cell."""
        for part in parts:
            cell = self.units[unit][part]
            yield grid.made(cell, self._measure(cell, self._names), self.head, {})


def begun(setting: Callable[[], Setting], cells: Sequence[Cell], names: Sequence[str]) -> Cells:
    """The work in the process of an actor."""
    return Cells(setting(), cells, names)


def run(team: Team, names: Sequence[str], out: Path | None) -> list[Row]:
    """The rows of all cells, of which those are measured that the file does not hold yet.

    Cells whose actors died, however often they were tried, have rows with an error.
    """
    check_writable("--out", out)
    journal = Journal(out)
    refuse_mixed_texts([*journal, {"settings": team.head.settings}])
    known = [grid.find(journal, cell, names, team.head) for (cell,) in team.units]
    todo = [Unit(number, (0,)) for number, rows in enumerate(known) if rows is None]
    with progress.bar() as shown:
        task = progress.start(shown, len(known), "cells")
        shown.advance(task, len(known) - len(todo))
        for found in in_order(todo, team.results(todo)):
            (cell,) = team.units[found.unit]
            rows = found.value
            if found.lost is not None:
                lost = {"error": f"{ShardError.__name__}: {found.lost}"}
                rows = grid.made(cell, dict.fromkeys(names, lost), team.head, {})
            for row in rows:
                journal.add(row)
            known[found.unit] = rows
            shown.advance(task)
    say_if_nothing_was_measured(out, journal.added)
    return [row for rows in known if rows is not None for row in rows]
