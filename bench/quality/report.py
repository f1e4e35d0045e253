"""An evaluation as one Markdown text, or as one HTML page with its plots inside."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from kvpress.bench.quality import plots
from kvpress.bench.quality.results import Results
from kvpress.bench.quality.table import HEAD, LEGEND, Block, blocks, cells_of, notes_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } svg { max-width: 100%; height: auto }
"""


def markdown(results: Results) -> str:
    """A heading and a table per task, length and protocol."""
    parts = ["# Quality and bytes", "", *(f"- {line}" for line in facts(results)), "", LEGEND, ""]
    for block in blocks(results):
        parts += [f"## {plots.title(block)}", "", _row(HEAD), _row(["---"] * len(HEAD))]
        parts += [_row(cells_of(line)) for line in block.lines]
        parts += ["", *(f"{note}  " for note in notes_of(block)), ""]
    return "\n".join(parts)


def page(results: Results) -> str:
    """A page that needs no other file and no network. Raises PlotError without matplotlib."""
    made = list(blocks(results))
    figures = [plots.quality(made), plots.needles(results)] if made else []
    body = [
        "<h1>Quality and bytes</h1>",
        "<ul>",
        *(f"<li>{html.escape(line)}</li>" for line in facts(results)),
        "</ul>",
        f"<p>{html.escape(LEGEND)}</p>",
        *(_svg(figure) for figure in figures if figure is not None),
        *(_section(block) for block in made),
    ]
    head = f'<meta charset="utf-8"><title>Quality and bytes</title><style>{_STYLE}</style>'
    return "\n".join([f"<!doctype html><html lang='en'><head>{head}</head><body>", *body])


def facts(results: Results) -> list[str]:
    """What was run where, line by line."""
    settings, where = results.settings, results.environment
    versions = ", ".join(f"{k} {v}" for k, v in where.get("versions", {}).items() if v)
    lines = [f"{name}: {value}" for name, value in settings.items() if value not in (None, False)]
    machine = where.get("cpu") if where.get("device") == "cpu" else where.get("device")
    return [
        *lines,
        f"machine: {machine}, {where.get('threads')} threads",
        f"versions: {versions}",
        f"commit: {where.get('commit')}",
    ]


def _section(block: Block) -> str:
    rows = [_cells("th", HEAD), *(_cells("td", cells_of(line)) for line in block.lines)]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes_of(block))
    table = f"<table>{''.join(rows)}</table>"
    return f"<h2>{html.escape(plots.title(block))}</h2>{table}{notes}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
