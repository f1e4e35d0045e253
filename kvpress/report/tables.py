"""Tables for terminals of any width, and numbers as people read them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_LABEL = 14  # characters below which a label is not folded


def new_table(
    labels: Sequence[str], numbers: Sequence[str] = (), title: str = "", notes: Sequence[str] = ()
) -> Table:
    """A table in the one style that all have, still without lines.

    labels: headings of columns that say what a line is about; they fold. numbers: of those that
    stay in one line. title and notes are plain text, over and under the table.
    """
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    made.title, made.title_justify = Text(title) if title else None, "left"
    made.caption, made.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    for name in labels:
        made.add_column(name, overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


class Fitted:
    """A table that loses nothing in a narrow terminal: columns that find no room go on below.

    Columns on the left that are aligned to the left say what a line is about: they fold, and stand
    before every part.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts(console, options))
        for number, chosen in enumerate(parts):
            last = number == len(parts) - 1
            yield _part(self._table, chosen, first=number == 0, last=last)

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[list[Column]]:
        """The columns of every part."""
        columns = list(self._table.columns)
        count = next((i for i, c in enumerate(columns) if c.justify != "left"), len(columns))
        labels, rest = columns[: max(1, count)], columns[max(1, count) :]
        around = self._table.padding[1] + self._table.padding[3] + 1

        def room(column: Column) -> int:
            widths = [
                Measurement.get(console, options, cell) for cell in (column.header, *column.cells)
            ]
            if column in labels:
                return min(max(w.maximum for w in widths), column.min_width or _LABEL) + around
            return max(w.maximum for w in widths) + around

        free = options.max_width - 1 - sum(room(column) for column in labels)
        part: list[Column] = []
        for column in rest:
            if part and sum(map(room, [*part, column])) > free:
                yield labels + part
                part = []
            part.append(column)
        yield labels + part


def _part(table: Table, columns: list[Column], first: bool, last: bool) -> Table:
    """Some columns of a table, with its title over the first part and its caption under the last.

    Numbers stay in one line, and whatever else finds no room is folded, never cut.
    """
    made = copy.copy(table)
    made.columns, made.rows = [], []
    made.title = table.title if first else None
    made.caption = table.caption if last else None
    for column in columns:
        made.add_column(
            column.header,
            justify=column.justify,
            no_wrap=column.justify == "right",
            overflow="fold",
        )
    for cells, row in zip(zip(*(c.cells for c in columns), strict=True), table.rows, strict=True):
        made.add_row(*cells, style=row.style, end_section=row.end_section)
    return made


def span(numbers: list[int]) -> str:
    """`low–high`, or one number where they agree."""
    if not numbers:
        return "0"
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def size(count: int) -> str:
    """Bytes for people: 1.5 MiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            digits = 0 if unit == "B" or amount >= 100 else 1
            return f"{amount:.{digits}f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
