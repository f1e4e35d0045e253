"""Data files of sessions: their names, whose they are, and removing those that nobody needs.

A session is a manifest `NAME` and, beside it, a data file `NAME.ID.pages` of the same id. The file
is complete before the manifest names it, and never written again. While it is being made its maker
holds a lock on it. What no manifest names and nobody locks was left by a process that died.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from kvpress.store.tiers.extents import UNIT

PAGES = "pages"  # under this name a manifest says which data file is its own
_MAGIC = b"KVPAGES\0"
_HEAD = struct.Struct("<8sQ16sQ16s")  # magic, layout; id; bytes of the file; xxh3-128 of these
_SUM = 16
_LARGEST_HEADER = 100_000_000  # bytes of the header of a manifest


def name_of(manifest: Path, session: bytes) -> Path:
    """The data file of a manifest."""
    return manifest.with_name(f"{manifest.name}.{session.hex()}.pages")


def head(layout: int, session: bytes, size: int) -> bytes:
    """The first bytes of a data file, of one unit."""
    fixed = _HEAD.pack(_MAGIC, layout, session, size, bytes(_SUM))[:-_SUM]
    return (fixed + xxhash.xxh3_128_digest(fixed)).ljust(UNIT, b"\0")


def read_head(found: bytes) -> tuple[int, bytes, int] | None:
    """The layout, the id and the size that a data file says it has; None where it is damaged."""
    if len(found) < _HEAD.size or not found.startswith(_MAGIC):
        return None
    _, layout, session, size, seal = _HEAD.unpack_from(found)
    whole = xxhash.xxh3_128_digest(found[: _HEAD.size - _SUM]) == seal
    return (layout, session, size) if whole and not any(found[_HEAD.size : UNIT]) else None


def named_by(manifest: Path) -> str | None:
    """The id of the data file that a manifest names; "" if it names none, None if it is unreadable.

    Only a few bytes of it are looked at, and nothing is verified.
    """
    try:
        if not manifest.exists():
            return ""
        if not manifest.is_file():
            return None
        with open(manifest, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text: Any = json.loads(file.read(size)) if size < _LARGEST_HEADER else None
        facts = text["__metadata__"]
        return str(json.loads(facts[PAGES])["id"]) if PAGES in facts else ""
    except (OSError, ValueError, LookupError, TypeError):
        return None


def tidy(manifest: Path) -> None:
    """Removes the data files beside a manifest that it does not name and that nobody makes now.

    Those of a manifest that cannot be read stay.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # nothing that was left is removed there
        return
    pattern = f"{glob.escape(manifest.name)}.{'[0-9a-f]' * 32}.pages"
    for name in glob.glob(pattern, root_dir=manifest.parent):
        with suppress(OSError):
            fd = os.open(manifest.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Only now: whoever held the lock may have made a manifest that names it.
                named = named_by(manifest)
                if named is not None and named != name.split(".")[-2]:
                    os.unlink(manifest.parent / name)
            finally:
                os.close(fd)
