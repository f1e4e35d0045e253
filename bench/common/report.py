"""What a report says, and measurements as one Markdown text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpress.bench.common.models import known_as
from rich.text import Text

from kvpress.report.tables import Fitted, new_table


@dataclass(frozen=True)
class Sheet:
    """A table in plain texts. labels: how many of its columns say what a line is about."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    labels: int = 1


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


def table(sheet: Sheet) -> Fitted:
    """The sheet for a terminal."""
    labels, numbers = sheet.head[: sheet.labels], sheet.head[sheet.labels :]
    made = new_table(labels, numbers, sheet.title, sheet.notes)
    for line in sheet.lines:
        made.add_row(*map(Text, line))
    return Fitted(made)


def settings_of(settings: Mapping[str, Any]) -> list[str]:
    """With what something was run, line by line; what was not given is left out."""
    return [f"{k}: {_plain(k, v)}" for k, v in settings.items() if v not in (None, False)]


def _plain(name: str, value: Any) -> str:
    """A value for people: the model by its full name, a text by name and beginning of its hash."""
    if name == "model":
        return known_as(str(value))
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


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
