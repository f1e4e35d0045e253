"""Measurements as one Markdown text, or as one HTML page with its plots inside."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Sheet:
    """A table in plain texts."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a page says. facts: what was run where. figures: made only for a page that shows them.

    legends: what the columns mean.
    """

    title: str
    facts: Sequence[str]
    legends: Sequence[str]
    sheets: Sequence[Sheet]
    figures: Callable[[], Sequence[Any]]


def markdown(report: Report) -> str:
    """A heading and a table per sheet."""
    parts = [f"# {report.title}", "", *(f"- {fact}" for fact in report.facts), ""]
    for legend in report.legends:
        parts += [legend, ""]
    for sheet in report.sheets:
        parts += [f"## {sheet.title}", "", _row(sheet.head), _row(["---"] * len(sheet.head))]
        parts += [_row(line) for line in sheet.lines]
        parts += ["", *(f"{note}  " for note in sheet.notes), ""]
    return "\n".join(parts)


def page(report: Report) -> str:
    """A page that needs no other file and no network. Raises PlotError without matplotlib."""
    title = html.escape(report.title)
    body = [
        f"<h1>{title}</h1>",
        "<ul>",
        *(f"<li>{html.escape(fact)}</li>" for fact in report.facts),
        "</ul>",
        *(f"<p>{html.escape(legend)}</p>" for legend in report.legends),
        *(_svg(figure) for figure in report.figures()),
        *(_section(sheet) for sheet in report.sheets),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return "\n".join([f"<!doctype html><html lang='en'><head>{head}</head><body>", *body])


def settings_of(settings: Mapping[str, Any]) -> list[str]:
    """With what something was run, line by line; what was not given is left out."""
    return [f"{k}: {_plain(v)}" for k, v in settings.items() if v not in (None, False)]


def _plain(value: Any) -> str:
    """A value for people: a text by its name and the beginning of its hash."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} (sha256 {value['sha256'][:12]}…)"
    return str(value)


def machine(environment: Mapping[str, Any]) -> list[str]:
    """Where something was run, line by line."""
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items() if v)
    where = environment.get("cpu" if environment.get("device") == "cpu" else "device")
    return [
        f"machine: {where}, {environment.get('threads')} threads",
        f"versions: {versions}",
        f"commit: {environment.get('commit')}",
    ]


def _section(sheet: Sheet) -> str:
    rows = [_cells("th", sheet.head), *(_cells("td", line) for line in sheet.lines)]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in sheet.notes)
    return f"<h2>{html.escape(sheet.title)}</h2><table>{''.join(rows)}</table>{notes}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
