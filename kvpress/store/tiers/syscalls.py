"""The calls of the operating system that the disk tier makes, in one object that tests replace."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpress import ops

_CLONE_RANGE = 0x4020940D  # FICLONERANGE


class Syscalls:
    """What is asked of the operating system. Errors are those of the module `os`."""

    def open(self, path: str | Path, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def lock(self, fd: int) -> None:
        """Locks a file for this open of it. Raises BlockingIOError where another one has."""
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def free_bytes(self, folder: Path) -> int:
        """What this user may still write in the file system of a folder."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def allocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def reflink(self, source: int, begin: int, size: int, target: int, at: int) -> None:
        """Makes a range of a file the same blocks as one of another, where the file system can."""
        import fcntl

        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("=qQQQ", source, begin, size, at))

    def copy_range(self, source: int, begin: int, size: int, target: int, at: int) -> int:
        """Copies a range from file to file in the kernel; how many bytes it did."""
        return os.copy_file_range(source, target, size, begin, at)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def forget(self, fd: int, offset: int, size: int) -> None:
        """Drops a range from the page cache."""
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

    def read(self, fd: int, reads_AX: Tensor, arena_X: Tensor, threads: int) -> Tensor:
        """Reads parts of a file into an arena, and verifies them: see csrc/read_records."""
        return ops.read_records(fd, reads_AX, arena_X, threads)
