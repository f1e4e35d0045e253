"""JSON lines on disk: appended as soon as they are known, found again by a later run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpress.bench.common.ranks import writes

from kvpress.errors import KVPressError

Row = dict[str, Any]


class JournalError(KVPressError, ValueError):
    """A file of JSON lines that cannot be read or written."""


class Journal:
    """Rows of measurements in memory and, with a path, on disk. A file that exists is gone on with.

    Raises JournalError.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[Row] = []
        self.added = 0  # rows since it was opened
        if path is not None and path.exists():
            self._rows = read(path)
            drop_broken_line(path)

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

    def __iter__(self) -> Iterator[Row]:
        yield from self._rows

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self._rows.append(row)
        self.added += 1
        if self._path is not None:
            append(self._path, row)


def text_of(path: Path) -> str:
    """The text of a file, of one that gzip made of it where there is only that. Raises OSError."""
    packed = path if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    if packed is path or (packed.exists() and not path.exists()):
        return gzip.decompress(packed.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def read(path: Path) -> list[Row]:
    """The lines of a file; a last one that a process died over is left out. Raises JournalError."""
    try:
        lines = text_of(path).split("\n")
        rows = [json.loads(line) for line in lines[:-1]]
    except FileNotFoundError as error:
        raise JournalError(f"{path} does not exist. Give a file that is there.") from error
    except (OSError, EOFError, ValueError) as error:
        raise JournalError(
            f"{path} does not hold JSON lines: {error}. Give another file."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise JournalError(f"{path} holds lines that are no JSON objects. Give another file.")
    return rows


def record_of(path: Path) -> Row | None:
    """The one object that a file holds, of a bench that writes one; None where it is not so."""
    try:
        record = json.loads(text_of(path))
    except (OSError, EOFError, ValueError):
        return None
    return record if isinstance(record, dict) and "bench" in record else None


def append(path: Path, row: Row) -> None:
    """Adds a line, in the first of processes that measure together. Raises JournalError."""
    if not writes():
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise JournalError(f"{path} cannot be written: {error}. Give another file.") from error


def drop_broken_line(path: Path) -> None:
    """Takes away what a process that died had written of its last line; only one process does."""
    if not writes():
        return
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
