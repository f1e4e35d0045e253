"""HTML pages that need no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvpress.bench.common.figures import inline_svg
from kvpress.bench.common.report import Report, Sheet

BASE = Path(__file__).with_name("base.css")  # colours, dark mode, headings
_REPORT = Path(__file__).with_name("report.css")


def shell(title: str, styles: Sequence[Path], body: Iterable[str]) -> str:
    """A page for screens of any width, light or dark. title: plain text."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in styles)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{style}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def page(report: Report) -> str:
    """What was measured: facts, tables, then plots. Raises PlotError without matplotlib."""
    return shell(report.title, (BASE, _REPORT), _body(report))


def _body(report: Report) -> Iterable[str]:
    yield f"<h1>{html.escape(report.title)}</h1>"
    yield "<ul>"
    yield from (f"<li>{html.escape(fact)}</li>" for fact in report.facts)
    yield "</ul>"
    yield from (f'<p class="hint">{html.escape(legend)}</p>' for legend in report.legends)
    yield from map(_section, report.sheets)
    figures = report.figures()
    if figures:
        yield "<h2>Plots</h2>"
    yield from (f"<figure>{inline_svg(figure, report.title)}</figure>" for figure in figures)


def _section(sheet: Sheet) -> str:
    rows = [_cells("th", sheet.head), *(_cells("td", line) for line in sheet.lines)]
    notes = "".join(f'<p class="hint">{html.escape(note)}</p>' for note in sheet.notes)
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return f"<h2>{html.escape(sheet.title)}</h2>{table}{notes}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"
