"""Sealed safetensors files: there whole or not at all, with every byte under a checksum."""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpress.errors import CacheFileError

_BLANK = b"0" * 32  # stands in the header while the checksum is computed
_SEAL = re.compile(rb'"checksum":"([0-9a-f]{32})"')
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_CHUNK = 1 << 24


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a file under a temporary name, seals it, and only then gives it its name.

    A process that dies meanwhile leaves what was there before, and perhaps a `.partial` file.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        save_file(dict(tensors), name, {**texts, "checksum": _BLANK.decode()})
        with open(name, "r+b") as file:
            with mmap.mmap(file.fileno(), 0) as data:
                start, _ = _find_seal(data)
                data[start : start + len(_BLANK)] = _checksum(data, start)
                data.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def metadata(path: str | Path) -> dict[str, Any]:
    """What was written beside the tensors. Raises CacheFileError if any byte has changed."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start, seal = _find_seal(data)
            if _checksum(data, start) != seal:
                raise CacheFileError("its checksum does not fit its contents")
        with safe_open(path, "pt") as opened:
            texts = opened.metadata()
        return {key: json.loads(text) for key, text in texts.items() if key != "checksum"}
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error}.") from error
    except (CacheFileError, ValueError, SafetensorError) as error:
        raise CacheFileError(
            f"{path} is no cache that this engine saved, or it was cut off or altered: {error}."
            " Nothing was loaded. Save the cache again."
        ) from error


def _find_seal(data: mmap.mmap) -> tuple[int, bytes]:
    """Where the checksum stands in the header, and what it says. Raises CacheFileError."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(_LARGEST_HEADER, len(data) - 8):
        raise CacheFileError("it has no safetensors header")
    found = list(_SEAL.finditer(data[8 : 8 + size]))
    if len(found) != 1:
        raise CacheFileError("it has no checksum")
    return 8 + found[0].start(1), found[0].group(1)


def _checksum(data: mmap.mmap, start: int) -> bytes:
    """The checksum of all bytes, with blanks where it stands itself."""
    digest, end = xxhash.xxh3_128(), start + len(_BLANK)
    with memoryview(data) as view:
        digest.update(view[:start])
        digest.update(_BLANK)
        for begin in range(end, len(view), _CHUNK):
            digest.update(view[begin : begin + _CHUNK])
    return digest.hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    """Makes a new name last: on POSIX the folder is written too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
