"""Rows of measurements as JSON lines: appended as soon as they are known, found again later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpress.errors import KVPressError

Row = dict[str, Any]


class JournalError(KVPressError, ValueError):
    """A file of rows that cannot be read or written."""


class Journal:
    """Rows in memory and, with a path, on disk. A file that exists is gone on with.

    Raises JournalError.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[Row] = []
        if path is not None and path.exists():
            self._rows = read(path)
            _drop_broken_line(path)

    def find(self, wanted: Mapping[str, Any]) -> Row | None:
        """The newest row without an error that has all these entries, or None."""
        return next(
            (
                row
                for row in reversed(self._rows)
                if row.get("error") is None and all(row.get(k) == v for k, v in wanted.items())
            ),
            None,
        )

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self._rows.append(row)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise JournalError(
                f"{self._path} cannot be written: {error}. Give another file."
            ) from error


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that a process died over is left out. Raises JournalError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]
    except (OSError, ValueError) as error:
        raise JournalError(
            f"{path} does not hold rows of measurements: {error}. Give another file."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise JournalError(f"{path} does not hold rows of measurements. Give another file.")
    return rows


def _drop_broken_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
