"""Sealed safetensors files: there whole or not at all, with every byte under a checksum.

The checksum finds damage. It is no signature: whoever can write a file can give it a right one.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from kvpress.errors import CacheFileError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where nothing that was left is removed
    fcntl = None  # type: ignore[assignment]

_BLANK = b"0" * 32  # stands in the header while the checksum is computed
_SEAL = re.compile(rb'"checksum":"([0-9a-f]{32})"')
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_PIECE = 1 << 24
_MOST_DIMENSIONS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Contents(NamedTuple):
    """What a file holds."""

    facts: dict[str, Any]  # what was written beside the tensors
    tensors: dict[str, Tensor]  # on the host


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    private: bool = True,
) -> None:
    """Writes a file under a temporary name, seals it, and only then gives it its name.

    `~` is the user's home, links are followed. A process that dies meanwhile leaves what was there
    before, and perhaps a file `.NAME.????????.partial` beside it, which the next one removes that
    writes NAME. A private file is for this user alone; another gets the usual mode, by umask.
    Raises CacheFileError, and nothing has changed then.
    """
    try:
        real = real_path(path)
        if real.exists():
            _check_regular(real.stat().st_mode)
        _remove_left(real)
        file, name = _partial(real, 0o600 if private else 0o666)
        try:
            with file:
                _write(file, tensors, facts)
                os.fsync(file.fileno())
                if fcntl is None:  # Windows renames no file that is open
                    file.close()
                os.replace(name, real)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(real.parent)
    except (OSError, ValueError, CacheFileError) as error:
        raise CacheFileError(
            f"{path} cannot be written: {error}. Nothing was changed. Free some space, or give the"
            " path of a file in a folder that exists and may be written to."
        ) from error


def read(path: str | Path) -> Contents:
    """What `write` wrote, read once: what is returned is what was checked.

    Raises CacheFileError if any byte has changed, or it is no such file.
    """
    try:
        with _opened(real_path(path)) as file:
            return _read(file)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RuntimeError, MemoryError) as error:  # also CacheFileError
        raise CacheFileError(
            f"{path} is no cache that this engine saved, or it was cut off or altered: {error}."
            " Nothing was loaded. Save the cache again."
        ) from error


def real_path(given: str | Path) -> Path:
    """Where a file really is: `~` is the user's home, links are followed. Raises CacheFileError."""
    try:
        return Path(os.path.realpath(os.path.expanduser(given)))
    except TypeError as error:
        kind = type(given).__name__
        raise CacheFileError(f"a {kind} is no path; give a str or a Path") from error


def _remove_left(real: Path) -> None:
    """Removes partial files of processes that died; those that live hold a lock on theirs."""
    if fcntl is None:
        return
    pattern = f".{glob.escape(real.name)}.????????.partial"
    for name in glob.glob(pattern, root_dir=real.parent):
        left = real.parent / name
        with suppress(OSError, CacheFileError), _opened(left) as file:
            _lock(file)
            left.unlink()


def _partial(real: Path, mode: int) -> tuple[IO[bytes], str]:
    """A new file beside another one, locked, and its name."""
    while True:
        name = str(real.with_name(f".{real.name}.{secrets.token_hex(4)}.partial"))
        # Made anew or not at all: what somebody put there is neither opened nor followed.
        file = open(name, "x+b", opener=partial(os.open, mode=mode))  # noqa: SIM115 - it is returned
        try:
            _lock(file)
        except BlockingIOError:  # another process took it for one that was left
            file.close()
            continue
        except OSError:  # a file system without locks, where nothing that was left is removed
            return file, name
        if os.path.exists(name):
            return file, name
        file.close()


def _lock(file: IO[bytes]) -> None:
    """Marks a file as in use until it is closed. Raises BlockingIOError if it is already."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(file: IO[bytes], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # all aligned
    header: dict[str, Any] = {
        "__metadata__": {
            **{name: json.dumps(value) for name, value in facts.items()},
            "checksum": _BLANK.decode(),
        }
    }
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    for piece in (len(text).to_bytes(8, "little"), text):
        digest.update(piece)
        file.write(piece)
    for name in order:
        data = _bytes(tensors[name].detach().cpu().contiguous())
        digest.update(data)
        file.write(data)
    file.seek(8 + _find_seal(text)[0])
    file.write(digest.hexdigest().encode())
    file.flush()


def _read(file: IO[bytes]) -> Contents:
    digest, size = xxhash.xxh3_128(), os.fstat(file.fileno()).st_size
    first = _exactly(file, 8, size)
    text = _exactly(file, int.from_bytes(first, "little"), min(size - 8, _LARGEST_HEADER))
    place, seal = _find_seal(text)
    blank = text[:place] + _BLANK + text[place + len(_BLANK) :]
    for piece in (first, blank):
        digest.update(piece)
    texts, entries = _header(text, size - 8 - len(text))
    tensors = {}
    for name, dtype, shape in entries:
        tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        _fill(file, tensors[name], digest)
    if digest.hexdigest().encode() != seal:
        raise CacheFileError("its checksum does not fit its contents")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise CacheFileError(f"the booleans of {name} are not 0 or 1")
    facts = {name: json.loads(value) for name, value in texts.items() if name != "checksum"}
    return Contents(facts, tensors)


def _header(text: bytes, data: int) -> tuple[dict[str, str], list[tuple[str, Any, list[int]]]]:
    """What stands beside the tensors, and names, types and shapes in the order of their bytes.

    data: how many bytes there are, which the tensors must fill exactly.
    """
    header: Any = json.loads(text)
    end, found = 0, []
    texts: Any = header.pop("__metadata__", None) if isinstance(header, dict) else None
    strings = isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
    if not strings or not all(_is_entry(entry) for entry in header.values()):
        raise CacheFileError("its header does not describe tensors")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise CacheFileError(f"the bytes of {name} do not fit its shape")
        end = stop
        found.append((name, dtype, shape))
    if end != data:
        raise CacheFileError(f"its tensors have {end} bytes, but {data} are there")
    return texts, found


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return False
    fits = len(shape) <= _MOST_DIMENSIONS and math.prod(max(1, n) for n in shape) < 2**60
    return fits and len(offsets) == 2 and entry["dtype"] in list(_DTYPES)


def _fill(file: IO[bytes], tensor: Tensor, digest: xxhash.xxh3_128) -> None:
    data = memoryview(_bytes(tensor))
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise CacheFileError("it ends too early")
        digest.update(piece)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _exactly(file: IO[bytes], count: int, most: int) -> bytes:
    if not 2 <= count <= most:
        raise CacheFileError("it has no safetensors header")
    return file.read(count)


def _find_seal(header: bytes) -> tuple[int, bytes]:
    """Where the checksum stands in the header, and what it says. Raises CacheFileError."""
    found = list(_SEAL.finditer(header))
    if len(found) != 1:
        raise CacheFileError("it has no checksum")
    return found[0].start(1), found[0].group(1)


def _opened(path: Path) -> IO[bytes]:
    """A regular file, open. Raises CacheFileError for devices, pipes and folders."""
    _check_regular(path.stat().st_mode)  # opening one of those may wait, or do something
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(handle, "rb")
    try:
        _check_regular(os.fstat(handle).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CacheFileError("it is no ordinary file")


def _sync_folder(folder: Path) -> None:
    """Makes a new name last: on POSIX the folder is written too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
