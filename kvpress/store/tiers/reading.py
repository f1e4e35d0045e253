"""Files of records, read past the page cache where their file system allows it.

Direct I/O asks that offset, length and address are multiples of 4096 bytes; what is not, and what a
file system refuses, goes through the other descriptor, and is then dropped from the page cache.
"""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from contextlib import suppress

import torch
from torch import Tensor

from kvpress.errors import TierError
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.syscalls import Syscalls

DIRECT = getattr(os, "O_DIRECT", 0)
_THREADS, _EACH = 4, 4  # that read at the same time, and so many reads for each
Row = tuple[int, int, int, int, int, int, int]


class ReadFile:
    """A file that is open twice: `fd`, and for direct I/O where that works.

    where: what errors call it.
    """

    def __init__(self, where: str, calls: Syscalls) -> None:
        self.where, self._calls = where, calls
        self._direct = self.fd = -1

    @property
    def direct(self) -> bool:
        """Whether reads and writes pass the page cache by."""
        return self._direct >= 0

    def read(self, rows: list[Row], arena_X: Tensor, again: bool = False) -> list[int]:
        """The statuses of verified reads into an arena: see `ops.read_records`.

        again: a second try, of what the disk itself holds.
        """
        if again or not self.direct:
            for offset, size, *_ in rows:
                self.forget(offset, size)
        straight = self.direct and not any(n % UNIT for row in rows for n in row[:3])
        found = self._read(self._direct if straight else self.fd, rows, arena_X)
        if straight and errno.EINVAL in found:
            found = self._read(self.fd, rows, arena_X)
            straight = False
        if not straight:
            for offset, size, *_ in rows:
                self.forget(offset, size)
        return found

    def _read(self, fd: int, rows: list[Row], arena_X: Tensor) -> list[int]:
        numbers = array("q", itertools.chain.from_iterable(rows))
        reads_AX = torch.frombuffer(numbers, dtype=torch.int64).view(len(rows), -1)
        # One after the other, small reads would each wait for the disk.
        threads = max(1, min(_THREADS, len(rows) // _EACH))
        return self._calls.read(fd, reads_AX, arena_X, threads).tolist()

    def peek(self, offset: int, size: int) -> bytes:
        """What is there now, unverified, for an error message; less where it cannot be read."""
        found = bytearray(size)
        with suppress(OSError):
            self.forget(offset, size)
            return bytes(found[: self._calls.preadv(self.fd, [found], offset)])
        return b""

    def failed(self, status: int, offset: int, size: int) -> TierError:
        """The error of a read that ended with an errno."""
        return self._failed("read", status, offset, size)

    def _failed(self, done: str, number: int | None, offset: int, size: int) -> TierError:
        return TierError(
            f"{size} bytes at {offset} of {self.where} could not be {done}:"
            f" {os.strerror(number or errno.EIO)}."
        )

    def forget(self, offset: int, size: int) -> None:
        """Drops a range from the page cache."""
        with suppress(OSError):
            self._calls.forget(self.fd, offset, size)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        for fd in (self._direct, self.fd):
            if fd >= 0:
                os.close(fd)
        self._direct = self.fd = -1
