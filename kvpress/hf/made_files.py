"""Reading the files that `kvpress calibrate` and `kvpress distill` make of a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpress.errors import CacheFileError, PolicyError
from kvpress.store import sealed


def read_made(option: str, path: str | Path, kind: str, how: str) -> sealed.Contents:
    """What is in a file that an option of a policy names.

    kind: what it should be, with its article. how: what makes a new one. Raises PolicyError, which
    says both, where the file cannot be read or any byte of it has changed.
    """
    try:
        return sealed.read(path)
    except CacheFileError as error:
        why = error.__cause__
        wrong = f"is not {kind}, or it was cut off or altered: {why}"
        if isinstance(why, OSError):
            wrong = f"cannot be read: {why}"
        raise PolicyError(f"{option}={path} {wrong}. {how}") from error


def shipped_files(option: str, folder: Path, ending: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of the package with this ending, and what they say. Raises PolicyError."""
    for file in sorted(folder.glob(f"*{ending}")):
        yield file, read_made(option, file, "what kvpress ships", "Install kvpress again.").facts
