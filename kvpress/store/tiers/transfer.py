"""Records on their way from a store to a file: copied by the kernel where that can be."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from kvpress.errors import TierError, TierTimeoutError
from kvpress.store.tiers.loads import Plan
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.syscalls import Syscalls

_MOST = 1 << 30  # bytes that the kernel is asked to copy at once


class Target:
    """A file that is being written. Blocks are shared with the source where they can be."""

    def __init__(self, fd: int, calls: Syscalls) -> None:
        self.fd, self.calls = fd, calls
        self._ways = [self._reflink, self._copy]  # those that have not failed yet
        self.copied = 0  # bytes that did not pass through memory of this process

    def write(self, data: memoryview, at: int) -> None:
        """Writes all of some bytes. Raises OSError."""
        done = 0
        while done < len(data):
            with suppress(InterruptedError):
                written = self.calls.pwritev(self.fd, [data[done:]], at + done)
                if written <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += written

    def clone(self, source: int, begin: int, size: int, at: int) -> bool:
        """Copies a range of another file; False where the kernel does not do it.

        Raises OSError where there is no room.
        """
        while self._ways:
            try:
                if self._ways[0](source, begin, size, at):
                    self.copied += size
                    return True
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                    raise
            del self._ways[0]
        return False

    def _reflink(self, source: int, begin: int, size: int, at: int) -> bool:
        self.calls.reflink(source, begin, size, self.fd, at)
        return True

    def _copy(self, source: int, begin: int, size: int, at: int) -> bool:
        done = 0
        while done < size:
            with suppress(InterruptedError):
                most = min(size - done, _MOST)
                copied = self.calls.copy_range(source, begin + done, most, self.fd, at + done)
                if copied <= 0:  # the source ends, or the file system does not do it after all
                    return False
                done += copied
        return True


def copy_out(parts: Parts, record: Record, target: Target, at: int) -> None:
    """Writes the bytes of a record to a file, from whichever tier has them.

    What passes through memory on its way from a file is verified. Raises TierError, OSError.
    """
    with parts.jobs.lock:
        on_host = record.host.sealed
        copy, file = (record.host, None) if on_host else parts.below(record)
        copy.pins += 1
    try:
        if file is None:
            target.write(parts.arena.bytes[copy.place : copy.place + record.bytes], at)
        elif target.clone(file.fd, copy.place, record.bytes, at):
            file.forget(copy.place, record.bytes)
        else:
            plan = Plan(record, range(record.slices), copy, file, whole=True)
            _through_memory(parts, plan, lambda data: target.write(data, at))
    finally:
        with parts.jobs.lock:
            copy.pins -= 1
            parts.placement.settle(record)
            parts.jobs.told()


def _through_memory(parts: Parts, plan: Plan, write: Callable[[memoryview], None]) -> None:
    size = plan.record.bytes
    with parts.jobs.lock:
        place = parts.wait_bounce(size)
    if place < 0:
        raise TierTimeoutError(
            f"{plan.record} was not copied within {parts.deadline_s} s: reads and tickets hold"
            f" {parts.bounce.held} of {parts.bounce.size} bytes of the space for that."
        )
    try:
        plan.place = place
        error = parts.loader.load([[plan]])[0]
        if error is not None:
            raise error
        write(parts.arena.bytes[place : place + size])
    finally:
        with parts.jobs.lock:
            parts.give_bounce(place)


def reserve_bounce(parts: Parts, size: int) -> None:
    """Makes sure that two records of this size can be on their way from a file. Raises TierError.

    A vault without a disk has no space for that: it takes a part of the host tier.
    """
    host = parts.placement.host
    with parts.jobs.lock:
        if not parts.bounce.size:
            part = max(4 * size, host.size // 8)
            place = host.take(part)
            if place is None:
                raise TierError(
                    f"The host tier has no room for what is read from a session: {part} of"
                    f" {host.size} bytes in one piece; {host.held} are held. Raise host=."
                )
            parts.placement.reserved[place] = host.taken[place]
            parts.bounce = type(host)(host.taken[place], place)
        if 2 * size > parts.bounce.size:
            raise TierError(
                f"A record of {size} bytes needs {2 * size} bytes to pass through on its way from"
                f" a session; {parts.bounce.size} are there. Raise host= to {4 * size} bytes."
            )
