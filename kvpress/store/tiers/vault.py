"""The host and the disk tier: records of bytes, capped in bytes, every one verified when read back.

    vault = Vault(Facts("..."), 2 << 30, DiskSpec.parse("20GiB:/scratch"))
    record = vault.put(slices_AX, owner)
    with vault.fetch(record) as ticket:
        use(ticket.wait())
    vault.free(record)

`put` returns when the record has a sealed copy: on the host, or on the disk where the host has no
room for it. Where the host is full it first waits until an older record has been written to the
disk. So the tensor may be used again at once, and every record has a sealed copy at every instant.
Records never change. Calls may come from several threads.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Sequence

from torch import Tensor

from kvpress import ops
from kvpress.errors import TierError
from kvpress.host import lasting
from kvpress.store.tiers.at_hand import AtHand
from kvpress.store.tiers.counters import Counters
from kvpress.store.tiers.disk import DiskFile
from kvpress.store.tiers.extents import UNIT, Extents
from kvpress.store.tiers.folder import DiskSpec
from kvpress.store.tiers.host import Arena, CopyEngine, copies
from kvpress.store.tiers.jobs import Jobs
from kvpress.store.tiers.loads import Loader
from kvpress.store.tiers.moves import Moves
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.placement import Placement
from kvpress.store.tiers.puts import Puts
from kvpress.store.tiers.reading import ReadFile
from kvpress.store.tiers.record import Entry, Facts, Owner, Record
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.ticket import Ticket, Wanted, ask, ask_all
from kvpress.store.tiers.transfer import Target, copy_out, reserve_bounce
from kvpress.store.tiers.watch import Watcher

_IN_FLIGHT = 64 << 20
_WORKERS = 2
_LEAST = 8 * UNIT  # of a host tier: two records of the smallest size, and as much to read them into


class Vault:
    """Records on the host and on the disk.

    host_bytes: all memory of the host tier. With a disk, at most `in_flight_bytes` of it and at
    most half is bounce space: what goes from the host straight to the disk and back passes through
    it. With 0 there is only bounce space, of `in_flight_bytes`. deadline_s: how long a caller waits
    for one read or write.
    """

    def __init__(
        self,
        facts: Facts,
        host_bytes: int,
        disk: DiskSpec | None,
        *,
        workers: int | None = None,
        deadline_s: float = 5.0,
        in_flight_bytes: int = _IN_FLIGHT,
        engine: CopyEngine | None = None,
        calls: Syscalls | None = None,
    ) -> None:
        ops.backends()  # compiled now if need be, not while somebody waits for a read
        engine = engine or copies()
        bounce, room = _divide(host_bytes, disk is not None, in_flight_bytes)
        self.workers = _WORKERS if workers is None else workers  # that read at the same time
        store, arena = secrets.token_bytes(16), Arena(bounce + room)
        file = DiskFile(disk, arena, store, calls or Syscalls()) if disk else None
        try:
            engine.pin(arena.tensor_X)
        except BaseException:
            if file:
                file.close()
            raise
        jobs = Jobs(self.workers)
        self._placement = Placement(Extents(room, bounce), file.extents if file else Extents(0))
        self.counters = counters = Counters(direct=file is not None and file.direct)
        loader = Loader(arena, store, counters, jobs.lock)
        self._parts = Parts(
            store, arena, jobs, self._placement, Extents(bounce), file, counters, deadline_s, loader
        )
        self._jobs, self._moves = jobs, Moves(self._parts)
        self._puts = Puts(self._parts, self._moves, facts, engine)
        self._end = weakref.finalize(self, _end, self._parts, engine, os.getpid())

    @property
    def arena_X(self) -> Tensor:
        """The host's memory: uint8."""
        return self._parts.arena.tensor_X

    @property
    def bytes_host(self) -> int:
        """Bytes that records hold on the host."""
        return self._placement.host.held

    @property
    def bytes_disk(self) -> int:
        """Bytes that records hold on the disk."""
        return self._placement.disk.held

    @property
    def capacity_host(self) -> int:
        """Bytes of the host tier that records can hold."""
        return self._placement.host.size

    @property
    def capacity_disk(self) -> int:
        """Bytes of the disk tier."""
        return self._placement.disk.size

    @property
    def bytes_bounce(self) -> int:
        """Bytes of the host's memory that reads and writes of the disk pass through."""
        return self._parts.bounce.size

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of bounce space that reads, writes and tickets hold now."""
        return self._parts.bounce.held - self._parts.kept.held

    def watch(self, watcher: Watcher | None) -> None:
        """Tells somebody of every read and write; None: nobody."""
        self.counters.watcher = watcher

    @lasting
    def put(self, slices_AX: Tensor, owner: Owner) -> Record:
        """A record of these slices, uint8 `[A, slice_bytes]`, one per head of its owner.

        Raises TierError, and leaves nothing, where there is no room or the disk fails.
        """
        self._puts.check(slices_AX, owner)
        with self._jobs.lock:
            self._check_open()
            record = self._placement.enter(owner, slices_AX.shape[1])
        try:
            self._puts.put(record, slices_AX)
        except BaseException:
            with self._jobs.lock:
                self._placement.free(record)
            raise
        record.published = True
        return record

    def fetch(
        self,
        record: Record,
        slices: Sequence[int] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        keep: bool = False,
    ) -> Ticket:
        """Begins to read slices of a record, all by default; lower priorities first.

        Tickets hold their bounce space until they are released, and a read waits until there is
        some for it. So whoever waits for one should hold others of at most half of that space.
        keep: what is read stays at hand afterwards, until others need its place. Raises TierError
        for a record or a slice that is not there.
        """
        slices = _in_a_row(range(record.slices) if slices is None else slices)
        limit = self._parts.deadline_s if deadline_s is None else deadline_s
        with self._jobs.lock:
            self._check_open()
            return ask(self._parts, [Wanted(record, slices, keep)], limit, priority)

    def fetch_all(self, wanted: Sequence[Wanted]) -> list[Ticket]:
        """The same of slices of several records, by few reads: tickets in order."""
        with self._jobs.lock:
            self._check_open()
            return ask_all(self._parts, wanted, self.workers)

    def at_hand(self) -> AtHand:
        """What takes in slices that need not be read."""
        self._check_open()
        return AtHand(self._parts)

    def free(self, record: Record) -> None:
        """Frees the places of a record, at once or when the last of its tickets is released."""
        with self._jobs.lock:
            self._placement.known(record)
            self._parts.forget(record)
            self._placement.free(record)
            self._jobs.told()

    def adopt(self, file: ReadFile, entries: Sequence[Entry]) -> list[Record]:
        """Records whose bytes lie in a file that is only read, and stays open as long as they are.

        Raises TierError where they are too large to pass through the host.
        """
        made: list[Record] = []
        with self._jobs.lock:
            self._check_open()
            for entry in entries:
                made.append(self._placement.adopt(file, entry))
        try:
            if made:
                reserve_bounce(self._parts, max(record.bytes for record in made))
        except BaseException:
            for record in made:
                self.free(record)
            raise
        return made

    def copy_out(self, record: Record, target: Target, at: int) -> None:
        """Writes the bytes of a record to a file. Raises TierError, OSError."""
        with self._jobs.lock:
            self._check_open()
            self._placement.known(record)
        copy_out(self._parts, record, target, at)

    def demote(self, record: Record) -> None:
        """Moves a record from the host to the disk. Raises TierError; it stays on the host."""
        with self._jobs.lock:
            self._check_open()
            self._placement.known(record)
            if record.host.pins:
                raise TierError(f"{record} is read from the host now. Release its tickets first.")
            if record.host.sealed:
                self._moves.demote(record)

    def promote(self, record: Record) -> None:
        """Copies a record from the disk to the host. Raises TierError; it stays on the disk."""
        with self._jobs.lock:
            self._check_open()
            self._placement.known(record)
            self._moves.promote(record)

    def check_integrity(self) -> None:
        """Raises CacheError unless every place has one owner, and every record a sealed copy."""
        with self._jobs.lock:
            self._placement.check(self._parts.bounced, self._parts.bounce)

    def close(self) -> None:
        """Ends all reads and writes; frees memory, file and lock. A second call does nothing."""
        self._end()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise TierError("This vault is closed. Make a new one.")


def _divide(host_bytes: int, disk: bool, in_flight_bytes: int) -> tuple[int, int]:
    """Bytes of bounce space and for records. Raises TierError."""
    if disk and not host_bytes:
        bounce, room, least = in_flight_bytes // UNIT * UNIT, 0, in_flight_bytes
    else:
        bounce = min(in_flight_bytes, host_bytes // 2) // UNIT * UNIT if disk else 0
        room, least = (host_bytes - bounce) // UNIT * UNIT, host_bytes
    if least < _LEAST:
        raise TierError(
            f"A host tier of {least} bytes is too small. Allowed: at least {_LEAST} bytes, or 0"
            " with a disk tier and as many bytes in flight."
        )
    return bounce, room


def _in_a_row(slices: Sequence[int]) -> Sequence[int]:
    """As a range where that is the same: it costs nothing to say where they lie."""
    run = range(slices[0], slices[0] + len(slices)) if slices else slices
    return run if list(run) == list(slices) else slices


def _end(parts: Parts, engine: CopyEngine, process: int) -> None:
    if os.getpid() != process:  # a fork has neither the threads nor the right to the lock
        return
    ended = parts.jobs.close(parts.deadline_s)
    if ended and parts.disk is not None:
        parts.disk.close()  # not under the feet of a read that hangs
    engine.unpin(parts.arena.tensor_X)
