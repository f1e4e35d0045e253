"""What a report of benchmarks says: tables, and tokens per second over lengths and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvpress.bench.common.figures import PlotError, add_legend, figure_of
from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Report, machine, settings_of
from kvpress.bench.speed import benches, layer
from kvpress.bench.speed.rows import Cell, by_cell

_MARKS = "os^Dv<>P*X"
_MEASURES = {
    "memory": ("bytes_peak_prefill", 2**20, "peak MiB"),
    **dict.fromkeys((*benches.TIMED, layer.NAME), ("tokens_per_second", 1, "tokens / s")),
}


def report(rows: Sequence[Row]) -> Report:
    """A sheet per cell, and a panel per benchmark and axis."""
    names = dict.fromkeys(row["bench"] for row in rows)
    legends = [f"{benches.BENCHES[n].TITLE}. {benches.BENCHES[n].LEGEND}" for n in names]
    newest = rows[-1]
    facts = [*settings_of(newest["settings"]), *machine(newest["environment"])]

    def figures() -> list[Any]:
        figure = plot(rows)
        return [] if figure is None else [figure]

    return Report("Time and memory", facts, legends, benches.sheets_of(rows), figures)


def plot(rows: Sequence[Row]) -> Any | None:
    """A figure: of every benchmark, over lengths at each batch and over batches at each length.

    None where no axis has two values. Raises PlotError without matplotlib.
    """
    cells = by_cell(rows)
    panels = list(lines_of(list(cells)))
    if not panels:
        return None
    figure, axes = figure_of(len(panels))
    names = dict.fromkeys(name for found in cells.values() for name in found)
    style = {name: (f"C{i % 10}", _MARKS[i % len(_MARKS)]) for i, name in enumerate(names)}
    for axis, (along, line) in zip(axes, panels, strict=False):
        _draw(axis, along, [(cell, cells[cell]) for cell in line], style)
    handles, labels = axes[0].get_legend_handles_labels()
    add_legend(figure, handles, labels)
    return figure


def lines_of(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """The axis, and the cells along it where all else is equal."""
    for along, other in (("tokens", "batch"), ("batch", "tokens")):
        for bench, fixed in dict.fromkeys((c.bench, getattr(c, other)) for c in cells):
            line = [c for c in cells if (c.bench, getattr(c, other)) == (bench, fixed)]
            if len(line) > 1:
                yield along, sorted(line)


def _draw(axis: Any, along: str, line: Sequence[Any], style: dict[str, tuple[str, str]]) -> None:
    cell = line[0][0]
    key, unit, label = _MEASURES[cell.bench]
    for name, (colour, mark) in style.items():
        points = [
            (getattr(place, along), found[name][key] / unit)
            for place, found in line
            if name in found and found[name]["error"] is None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=mark, label=name)
    other = f"batch {cell.batch}" if along == "tokens" else f"{cell.tokens:,} tokens"
    axis.set_title(f"{benches.BENCHES[cell.bench].TITLE}, {other}", fontsize=9, loc="left")
    axis.set_xlabel("tokens of a prompt" if along == "tokens" else "batch", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)


def drawn(rows: Sequence[Row], source: object) -> Any:
    """The figure. Raises PlotError where there is none."""
    figure = plot(rows)
    if figure is None:
        raise PlotError(
            f"{source} holds one length and one batch: nothing to draw a line through. Measure"
            " several --tokens or --batch."
        )
    return figure
