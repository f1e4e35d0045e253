"""The data file of a session while it is made, and while it is read."""

from __future__ import annotations

import os
import secrets
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from kvpress.errors import CacheFileError
from kvpress.store.tiers import beside
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.host import Arena
from kvpress.store.tiers.loads import Plan, failure
from kvpress.store.tiers.reading import DIRECT, ReadFile
from kvpress.store.tiers.record import LAYOUT, Copy, Entry, Facts, Owner, Record
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.transfer import Target
from kvpress.store.tiers.vault import Vault


class DataFile:
    """A new data file beside a manifest, as a context: what is not named at its end is removed.

    facts: what stands in the headers of records that are made for it.
    """

    def __init__(self, manifest: Path, facts: Facts, calls: Syscalls | None = None) -> None:
        self._manifest, self._facts, self._calls = manifest, facts, calls or Syscalls()
        self.bytes, self._number, self._fd = UNIT, 0, -1
        beside.tidy(manifest)
        while self._fd < 0:  # anew if another process took it for one that was left
            self.id = secrets.token_bytes(16)
            self.path = beside.name_of(manifest, self.id)
            self._fd = self._locked()
        self._target = Target(self._fd, self._calls)

    def _locked(self) -> int:
        """The new file, locked; -1 if it is gone."""
        fd = self._calls.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._calls.lock(fd)
        except BlockingIOError:
            os.close(fd)
            return -1
        except OSError:  # a file system without locks, where nothing that was left is removed
            return fd
        if os.path.exists(self.path):
            return fd
        os.close(fd)
        return -1

    @property
    def copied(self) -> int:
        """Bytes that did not pass through memory of this process."""
        return self._target.copied

    def copy(self, record: Record, vault: Vault) -> Entry:
        """Adds the bytes of a record of a vault. Raises TierError, OSError."""
        place = self._place(record.bytes)
        vault.copy_out(record, self._target, place)
        return Entry(place, record.owner, record.slice_bytes, record.digests, record.digest)

    def seal(self, slices_AX: Tensor, owner: Owner) -> Entry:
        """Adds a record of slices, uint8 `[A, slice_bytes]`. Raises OSError."""
        record = Record(self._number, 1, owner, slices_AX.shape[1])
        self._number += 1
        image = bytearray(record.bytes)
        begin, end = record.begin(0), record.begin(record.slices)
        whole_X = torch.frombuffer(image, dtype=torch.uint8)
        whole_X[begin:end].view(slices_AX.shape).copy_(slices_AX)
        record.seal(memoryview(image), self.id, self._facts.digest)
        place = self._place(record.bytes)
        self._target.write(memoryview(image), place)
        return Entry(place, owner, record.slice_bytes, record.digests, record.digest)

    def finish(self) -> dict[str, object]:
        """Makes sure that all bytes are on the disk. Returns what the manifest must say of them."""
        self._target.write(memoryview(beside.head(LAYOUT, self.id, self.bytes)), 0)
        self._calls.sync_data(self._fd)
        with suppress(OSError):
            self._calls.forget(self._fd, 0, self.bytes)
        return {"id": self.id.hex(), "bytes": self.bytes, "layout": LAYOUT}

    def _place(self, size: int) -> int:
        place, self.bytes = self.bytes, self.bytes + size
        return place

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)  # and with it the lock
        beside.tidy(self._manifest)
        if error is not None and beside.named_by(self._manifest) != self.id.hex():
            self.path.unlink(missing_ok=True)


class Source(ReadFile):
    """The data file of a session, to be read. It stays open as long as a record lies in it.

    pages: what the manifest says of it. lazy: whether records stay in it until they are wanted.
    Raises CacheFileError unless it is that file, and whole as far as its size tells.
    """

    def __init__(self, manifest: Path, pages: object, lazy: bool, calls: Syscalls) -> None:
        session, size = _checked(manifest, pages)
        self.id, self.lazy, self.bytes = session, lazy, size
        self.path = beside.name_of(manifest, session)
        super().__init__(f"the session's data file {self.path}", calls)
        self._buffer: Arena | None = None
        try:
            self.fd = calls.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            self._check(os.fstat(self.fd).st_size)
            with suppress(OSError):
                self._direct = calls.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | DIRECT)
        except OSError as error:
            raise CacheFileError(
                f"{manifest} needs the file {self.path.name} beside it, where its pages are, which"
                f" cannot be read: {error}. Copy, move and rename both together, or save again."
            ) from error
        finally:
            self._end = weakref.finalize(self, _close, [self._direct, self.fd])

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._end()
        self._direct = self.fd = -1

    def _check(self, size: int) -> None:
        """Raises CacheFileError unless its size and its head are those of the manifest's file."""
        known = beside.read_head(self.peek(0, UNIT))
        reason = ""
        if size != self.bytes:
            reason = f"it has {size} bytes instead of {self.bytes}: it was cut off or added to"
        elif known is None:
            reason = "its head is damaged, or it is no data file of a session"
        elif known != (LAYOUT, self.id, self.bytes):
            reason = f"it belongs to the save {known[1].hex()}, not to {self.id.hex()}"
        if reason:
            raise CacheFileError(
                f"{self.path} cannot be used: {reason}. Nothing was loaded. Save the cache again."
            )

    def slices(self, entry: Entry) -> Tensor:
        """The slices of a record, verified: uint8 `[A, slice_bytes]`, valid until the next call.

        Raises CacheFileError where they are not what was saved.
        """
        record = Record(0, 0, entry.owner, entry.slice_bytes)
        record.digests, record.digest = entry.digests, entry.digest
        if self._buffer is None or len(self._buffer.bytes) < record.bytes:
            self._buffer = Arena(record.bytes)
        plan = Plan(record, range(record.slices), _at(entry.place), self, whole=True)
        plan.place = 0
        rows, arena_X = plan.rows(), self._buffer.tensor_X
        if any(self.read(rows, arena_X)) and any(found := self.read(rows, arena_X, again=True)):
            error = failure(plan, rows, found, self.id)
            raise CacheFileError(f"{error} Nothing was loaded.") from error
        return self._buffer.rows(plan.begins(), record.slice_bytes)


def _at(place: int) -> Copy:
    copy = Copy()
    copy.place = place
    return copy


def _close(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _checked(manifest: Path, pages: object) -> tuple[bytes, int]:
    """The id and the bytes of a data file, as a manifest gives them. Raises CacheFileError."""
    if isinstance(pages, dict) and pages.keys() == {"id", "bytes", "layout"}:
        session, size, layout = pages["id"], pages["bytes"], pages["layout"]
        if layout != LAYOUT:
            raise CacheFileError(
                f"{manifest}: its pages have the layout {layout!r}, but here it is {LAYOUT}. Save"
                " it again with this version of the engine."
            )
        with suppress(ValueError, TypeError):
            if len(found := bytes.fromhex(session)) == 16 and type(size) is int:
                return found, size
    raise CacheFileError(f"{manifest} does not say which data file is its own. Save it again.")
