"""A disk that fails as a test wants, copies that are late, and vaults of small records."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.folder import DiskSpec
from kvpress.store.tiers.record import Facts, Owner, Record
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.vault import Vault

FACTS = Facts("a test")
MASK = 2**64 - 1
NAMES = ("open", "lock", "free_bytes", "allocate", "preadv", "pwritev", "forget")


class Faulty(Syscalls):
    """Counts calls. A fault of a name is asked instead: `fault(number, real, *arguments)`.

    Reads are made here, by `preadv`, so that there is something to inject faults into.
    """

    def __init__(self, **faults: Callable[..., Any]) -> None:
        self.faults, self.counts, self.files = faults, Counter(), []

    def read(self, fd: int, reads_AX: Tensor, arena_X: Tensor, threads: int) -> Tensor:
        arena = memoryview(arena_X.numpy())
        return torch.tensor([self.status(fd, arena, *row) for row in reads_AX.tolist()])

    def status(
        self, fd: int, arena: memoryview, offset: int, size: int, place: int, *checked: int
    ) -> int:
        done, (begin, length, low, high) = 0, checked
        while done < size:
            try:
                read = self.preadv(fd, [arena[place + done : place + size]], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                return error.errno or errno.EIO
            if not read:
                return -1
            done += read
        digest = xxhash.xxh3_128_intdigest(arena[place + begin : place + begin + length])
        return 0 if digest == (high & MASK) << 64 | low & MASK else -2


def _call(name: str) -> Callable[..., Any]:
    def call(self: Faulty, *arguments: Any) -> Any:
        self.counts[name] += 1
        real = getattr(super(Faulty, self), name)
        fault = self.faults.get(name)
        done = fault(self.counts[name], real, *arguments) if fault else real(*arguments)
        if name == "open" and not str(arguments[0]).endswith(".lock"):
            self.files.append(done)  # the file, then the same for direct I/O
        return done

    return call


for _name in NAMES:
    setattr(Faulty, _name, _call(_name))


def fails(number: int, first: int = 1, last: float = float("inf")) -> Callable[..., Any]:
    """A call that fails with an errno, from the first to the last of these calls."""

    def fault(count: int, real: Callable[..., Any], *arguments: Any) -> Any:
        if first <= count <= last:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return fault


def short(most: int) -> Callable[..., Any]:
    """A read or write that does `most` bytes at a time."""

    def fault(count: int, real: Callable[..., Any], fd: int, buffers: Any, offset: int) -> Any:
        return real(fd, [memoryview(buffers[0]).cast("B")[:most]], offset)

    return fault


def no_direct(count: int, real: Callable[..., Any], path: Any, flags: int, *mode: Any) -> Any:
    """An `open` of a file system without direct I/O."""
    if flags & os.O_DIRECT:
        raise OSError(22, "Invalid argument")
    return real(path, flags, *mode)


class Late:
    """A copy that happens when it is waited for, and not before."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = target, source

    def wait(self) -> None:
        time.sleep(random.random() / 1000)
        self.target.copy_(self.source)


class LateCopies:
    """Copies as late as they may be."""

    def pin(self, arena_X: Tensor) -> None:
        self.pinned = arena_X

    def unpin(self, arena_X: Tensor) -> None:
        assert arena_X.data_ptr() == self.pinned.data_ptr()

    def fence(self, device: torch.device) -> None:
        return

    def after(self, fence: None) -> None:
        return

    def copy(self, target: Tensor, source: Tensor) -> Late:
        return Late(target, source)

    def gather(
        self, target_PX: Tensor, to: list[int], source_X: Tensor, begins: list[int]
    ) -> Together:
        width = target_PX.shape[1]
        both = zip(to, begins, strict=True)
        return Together([self.copy(target_PX[a], source_X[b : b + width]) for a, b in both])


class Together:
    """Several copies."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def wait(self) -> None:
        for part in self.parts:
            part.wait()


@contextmanager
def memory_folder(other: Path) -> Iterator[Path]:
    """A folder in memory, where there is one, for tests of many small reads."""
    root = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=root if os.access(root, os.W_OK) else other) as folder:
        yield Path(folder)


def vault(folder: Path | None, records: int = 64, host: int = 0, **options: Any) -> Vault:
    """A vault for so many records of two units on the disk, and bytes on the host."""
    disk = DiskSpec(records * 2 * UNIT, folder) if folder else None
    options = {"in_flight_bytes": 8 * 2 * UNIT} | options
    return Vault(FACTS, host, disk, **options)


def owner(heads: int = 2, sequence: int = 0, first: int = 0) -> Owner:
    return Owner(3, 1, sequence, tuple(range(heads)), first, 16)


def slices(heads: int = 2, width: int = 1000) -> Tensor:
    return torch.randint(256, (heads, width), dtype=torch.uint8)


def read(store: Vault, record: Record, wanted: Any = None) -> Tensor:
    """A copy of what a fetch gives."""
    with store.fetch(record, wanted) as ticket:
        return ticket.wait().clone()


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def close(store: Vault) -> None:
    with suppress(Exception):
        store.close()
