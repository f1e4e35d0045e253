"""A report for people: a table in which layers that are alike are one line, as text and as HTML."""

from __future__ import annotations

import html
import io
import shutil
from itertools import groupby

from rich.console import Console
from rich.table import Table

from kvpress.report import reads, tiers
from kvpress.report.figures import Figures, LayerReport
from kvpress.report.tables import Fitted, new_table, size, span

_HEAD = ("layers", "kind", "tokens seen", "slots kept", "bytes held", "bytes full", "fraction")
_WIDTH = 100  # of a text that is printed to no terminal


def lines(report: Figures) -> list[tuple[str, ...]]:
    """A line per group of layers that are alike, bytes of the whole group; the last one sums up."""
    groups: dict[object, list[LayerReport]] = {}
    for layer in report.layers:
        alike = layer.kind, span(_slots(layer)), layer.bytes_held, layer.bytes_full
        groups.setdefault(alike, []).append(layer)
    made = [
        _line(
            _ranges(group),
            group[0].kind,
            report,
            group,
            sum(layer.bytes_held for layer in group),
            sum(layer.bytes_full for layer in group),
        )
        for group in groups.values()
    ]
    return [*made, _line("all", "", report, report.layers, report.bytes_held, report.bytes_full)]


def remarks(report: Figures) -> list[str]:
    """What the table does not say, sentence by sentence."""
    made = []
    shares = [share for layer in report.layers for share in layer.density]
    if shares:
        made.append(
            f"Blocks of prompt attention computed: {report.density:.1%}, by layer and head"
            f" {min(shares):.1%} – {max(shares):.1%}."
        )
    if report.ranks:
        held = " + ".join(size(x.held) for x in report.ranks)
        sums = [sum(x) for x in zip(*((x.held, x.full) for x in report.ranks), strict=True)]
        made.append(
            f"This is one of {len(report.ranks)} processes, which hold {held} = {size(sums[0])} of"
            f" {size(sums[1])} together."
        )
    if report.bytes_peak:
        made.append(f"Peak so far: {size(report.bytes_peak)}.")
    if report.bytes_states:
        made.append(
            f"Besides, states of layers of linear attention: {size(report.bytes_states)}, which no"
            " policy compresses."
        )
    if report.bytes_ids:
        made.append(f"Besides, ids of the tokens seen: {size(report.bytes_ids)}.")
    if report.bytes_shared:
        made.append(f"Shared with forks: {size(report.bytes_shared)} of the bytes held.")
    if own := [layer.reads for layer in report.layers if layer.reads is not None]:
        made.append(reads.remark(own))
    if report.tiers is not None:
        made.append(tiers.remark(report.tiers))
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in report.stages.items())
    return [*made, f"Seconds: {seconds}", *(f"Note: {note}" for note in report.notes)]


def table(report: Figures) -> Table:
    """The table for a terminal."""
    made = new_table(_HEAD[:2], _HEAD[2:], _title(report))
    *groups, total = lines(report)
    for line in groups:
        made.add_row(*line, end_section=line is groups[-1])
    made.add_row(*total)
    return made


def text(report: Figures) -> str:
    """The table and its remarks without colours, as wide as the terminal."""
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Fitted(table(report)))
    for remark in remarks(report):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.rstrip().splitlines())


def page(report: Figures) -> str:
    """The table and its remarks as HTML, for a notebook."""
    head = "".join(f"<th>{title}</th>" for title in _HEAD)
    body = "".join(f"<tr>{_cells(line)}</tr>" for line in lines(report))
    below = "".join(f"<div>{html.escape(remark)}</div>" for remark in remarks(report))
    caption = html.escape(_title(report))
    return (
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{below}"
    )


def _title(report: Figures) -> str:
    return f"{report.policy} on {report.model}"


def _slots(layer: LayerReport) -> list[int]:
    return [slots for rows in layer.slots_kept for slots in rows]


def _line(
    name: str, kind: str, report: Figures, layers: list[LayerReport], held: int, full: int
) -> tuple[str, ...]:
    return (
        name,
        kind,
        span(report.tokens_seen),
        span([slots for layer in layers for slots in _slots(layer)]),
        size(held),
        size(full),
        f"{held / max(full, 1):.3f}",
    )


def _ranges(layers: list[LayerReport]) -> str:
    """The numbers of layers: `0–3, 5`."""
    numbered = enumerate(layer.index for layer in layers)
    runs = [[index for _, index in run] for _, run in groupby(numbered, lambda x: x[1] - x[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _cells(line: tuple[str, ...]) -> str:
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
