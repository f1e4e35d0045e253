"""Texts that contexts and prompts are taken from, each with its name and hash.

The default is Python's language reference as Python 3.11.7 had it, kept in `texts/`: what an
interpreter carries differs from version to version, and with it every score.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

from kvpress.errors import KVPressError

_DEFAULT = "python-reference-3.11.7"
_SHA256 = "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"


class TextError(KVPressError, ValueError):
    """A text that cannot be read, or is not the one that it should be."""


class Text(NamedTuple):
    """A text and what it is called."""

    name: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """What a record says of it: its name, and the SHA-256 of it in UTF-8."""
        return {"name": self.name, "sha256": hashlib.sha256(self.content.encode()).hexdigest()}


@functools.cache
def default_text() -> Text:
    """Python's language reference: 465,126 characters. Raises TextError where it was changed."""
    path = Path(__file__).with_name("texts") / f"{_DEFAULT}.txt.gz"
    try:
        made = Text(_DEFAULT, gzip.decompress(path.read_bytes()).decode())
    except (OSError, EOFError, ValueError) as error:
        raise TextError(f"{path} cannot be read: {error}. Install the package again.") from error
    if made.to_dict()["sha256"] != _SHA256:
        raise TextError(f"{path} is not the text it should be. Install the package again.")
    return made


def read_text(path: Path) -> Text:
    """A text file, named as it is. Raises TextError."""
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as text: {error}. Give a UTF-8 file.") from error
