"""Files that commands write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from kvpress.errors import KVPressError

console, errors = Console(), Console(stderr=True)


class OutputError(KVPressError, ValueError):
    """A file that cannot be written."""


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file whose folder is not there before a long run, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"{option} {path}: it must be a file in a folder that exists. Make the folder first."
        )


def write(path: Path, content: bytes) -> None:
    """Writes a file and says so. Raises OutputError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Give another file.") from error
    console.print(f"Wrote {path}.", highlight=False)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record; the file is replaced at once, never half written. Raises OutputError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}. Give another file.") from error


def say_if_nothing_was_measured(path: Path | None, measured: int) -> None:
    """On stderr, so that what a program reads stays as it is."""
    if path is not None and not measured:
        said = f"Nothing was measured: {path} holds all of it already."
        errors.print(said, markup=False, highlight=False, soft_wrap=True)
