"""The folder of a disk tier: who uses it, and a file in it that has no name.

A store has a file of its own, which nobody else can open and which is gone when the process is,
however it ends. The lock `kvpress.lock` is there so that two stores do not fill one folder unseen.
It is removed when the store is closed; one that a dead process left is taken over. Stores of one
process may share a folder, and with it the lock: whoever made the second one knows of the first.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvpress.errors import TierError
from kvpress.formulas.sizes import UNITS, parse_size
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.syscalls import Syscalls

LOCK = "kvpress.lock"
_NO_ALLOCATION = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_ZEROS = 1 << 20  # bytes at a time
_TMPFILE = getattr(os, "O_TMPFILE", 0)
_GUARD = threading.RLock()  # a store may end, and release its lock, while another one takes its own


class DiskSpec(NamedTuple):
    """The most bytes of a disk tier, and the folder that they lie in."""

    bytes: int
    folder: Path

    @classmethod
    def parse(cls, text: str) -> DiskSpec:
        """Reads `20GiB:folder`. Raises TierError."""
        size, colon, folder = text.partition(":")
        size_bytes = parse_size(size)
        if not colon or not folder.strip() or size_bytes is None or size_bytes < UNIT:
            raise TierError(
                f"disk={text!r} cannot be read. Allowed: a size of at least {UNIT}B with a unit"
                f" ({', '.join(UNITS)}, in any case), a colon and a folder that exists, as in"
                " 20GiB:/scratch."
            )
        return cls(size_bytes, Path(folder.strip()).expanduser())


class _Held:
    """A lock of this process. A file is locked for one opening of it: its stores share that."""

    def __init__(self) -> None:
        self.fd, self.stores = -1, 0


_HELD: dict[tuple[int, str], _Held] = {}  # by process and path


class FolderLock:
    """The lock of a folder, held until the last store of this process releases it.

    Raises TierError where another process holds it.
    """

    def __init__(self, folder: Path, store: bytes, calls: Syscalls) -> None:
        self._path, self._released = folder / LOCK, False
        self._key = (os.getpid(), os.path.realpath(self._path))
        with _GUARD:
            self._held = _HELD.setdefault(self._key, _Held())
            self._held.stores += 1  # from here on no other store is the last one
            try:
                if self._held.fd < 0:
                    self._held.fd = self._take(store, calls)
            except BaseException:
                self._held.stores -= 1
                raise
            _HELD[self._key] = self._held  # the last one may have ended before that

    def _take(self, store: bytes, calls: Syscalls) -> int:
        fd = -1
        while fd < 0:  # anew if the holder removed the file between opening and locking
            fd = self._try(calls)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {store.hex()}\n".encode(), 0)
        return fd

    def _try(self, calls: Syscalls) -> int:
        try:
            fd = calls.open(self._path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _unusable(self._path.parent, error) from error
        try:
            calls.lock(fd)
            if os.path.exists(self._path) and os.path.samestat(os.fstat(fd), os.stat(self._path)):
                return fd
        except BlockingIOError as error:
            pid, _, store = os.pread(fd, 100, 0).decode(errors="replace").strip().partition(" ")
            os.close(fd)
            raise TierError(
                f"The folder {self._path.parent} is used by process {pid or 'unknown'} (store"
                f" {store or 'unknown'}). Give each process a folder of its own, or end the other."
            ) from error
        except OSError as error:
            os.close(fd)
            raise _unusable(self._path.parent, error) from error
        os.close(fd)
        return -1

    def release(self) -> None:
        """Removes the lock if nobody else here has it; a second call does nothing."""
        with _GUARD:
            if self._released:
                return
            self._released = True
            self._held.stores -= 1
            if self._held.stores == 0:
                with suppress(OSError):
                    self._path.unlink()
                os.close(self._held.fd)
                self._held.fd = -1
                _HELD.pop(self._key, None)


def nameless_file(folder: Path, size: int, calls: Syscalls) -> int:
    """A new file of `size` bytes without a name, of mode 0600, open to read and write.

    Raises TierError, and leaves nothing, where the folder or its file system has no room for it.
    """
    fd = -1
    try:
        free = calls.free_bytes(folder)
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fd = _opened(folder, calls)
        _allocate(fd, size, calls)
        return fd
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TierError(
                f"The disk tier needs {size} bytes in {folder}, where {calls.free_bytes(folder)}"
                f" are free ({error.strerror}). Lower its size, or choose another folder."
            ) from error
        raise _unusable(folder, error) from error


def check_folder(folder: Path) -> None:
    """Raises TierError unless a folder is one, and files can be made in it."""
    reason = ""
    try:
        if not folder.exists():
            reason = "does not exist"
        elif not folder.is_dir():
            reason = "is no folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "cannot be written to by this user"
    except OSError as error:
        raise _unusable(folder, error) from error
    if reason:
        raise TierError(
            f"The folder {folder} of the disk tier {reason}. Give one that exists and is writable,"
            " as in 20GiB:/scratch."
        )


def _unusable(folder: Path, error: OSError) -> TierError:
    return TierError(f"The folder {folder} cannot hold a disk tier: {error}. Choose another one.")


def _opened(folder: Path, calls: Syscalls) -> int:
    if _TMPFILE:
        with suppress(OSError):  # a file system may not have it
            return calls.open(folder, _TMPFILE | os.O_RDWR)
    path = folder / f"kvpress-{secrets.token_hex(8)}.tier"
    fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    return fd


def _allocate(fd: int, size: int, calls: Syscalls) -> None:
    """Gives a file its bytes now, so that the disk cannot be full later."""
    try:
        calls.allocate(fd, size)
        return
    except OSError as error:
        if error.errno not in _NO_ALLOCATION:
            raise
    zeros, at = bytes(_ZEROS), 0
    while at < size:
        with suppress(InterruptedError):
            written = calls.pwritev(fd, [memoryview(zeros)[: size - at]], at)
            if written <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += written
