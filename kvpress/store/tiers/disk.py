"""The disk tier's file: written and read past the page cache where the file system allows it.

See reading.py. Whether direct I/O works is tried at start, with real bytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from contextlib import suppress

from kvpress.store.tiers.extents import UNIT, Extents
from kvpress.store.tiers.folder import DiskSpec, FolderLock, check_folder, nameless_file
from kvpress.store.tiers.host import Arena
from kvpress.store.tiers.reading import DIRECT, ReadFile
from kvpress.store.tiers.syscalls import Syscalls


class DiskFile(ReadFile):
    """One preallocated file. Raises TierError where it cannot be made; nothing is left then."""

    def __init__(self, spec: DiskSpec, arena: Arena, store: bytes, calls: Syscalls) -> None:
        super().__init__(f"the disk tier in {spec.folder}", calls)
        self._arena = arena
        self.folder, self.extents = spec.folder, Extents(spec.bytes)
        check_folder(spec.folder)
        self._lock = FolderLock(spec.folder, store, calls)
        try:
            self.fd = nameless_file(spec.folder, self.extents.size, calls)
            self._direct = self._probe()
        except BaseException:
            self.close()
            raise

    def _probe(self) -> int:
        """A descriptor for direct I/O that has shown to work; -1 if there is none."""
        fd = -1
        with suppress(OSError), mmap.mmap(-1, 2 * UNIT) as both:
            fd = self._calls.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | DIRECT)
            with memoryview(both) as view, view[:UNIT] as sent, view[UNIT:] as found:
                sent[:] = secrets.token_bytes(UNIT)
                written = self._calls.pwritev(fd, [sent], 0)
                read = self._calls.preadv(fd, [found], 0)
                if DIRECT and written == read == UNIT and sent == found:
                    return fd
        if fd >= 0:
            os.close(fd)
        return -1

    def write(self, offset: int, place: int, size: int) -> None:
        """Writes a part of the arena, all of it. Raises TierError."""
        done, direct = 0, self.direct
        while done < size:
            data = self._arena.bytes[place + done : place + size]
            aligned = not (place + done) % UNIT and not len(data) % UNIT
            straight = direct and aligned and not (offset + done) % UNIT
            fd = self._direct if straight else self.fd
            try:
                written = self._calls.pwritev(fd, [data], offset + done)
                if written <= 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            except InterruptedError:
                continue
            except OSError as error:
                if straight and error.errno == errno.EINVAL:
                    direct = False  # this range is refused: through the page cache then
                    continue
                raise self._failed("written", error.errno, offset, size) from error
            if not straight:
                self.forget(offset + done, written)
            done += written

    def close(self) -> None:
        """Frees the file and the lock; a second call does nothing."""
        super().close()
        self._lock.release()
