"""Records on their way between host and disk, and the rule by which they make room.

A new record goes to the host. If that is full, the record that was used longest ago and that nobody
reads is written to the disk; its place on the host is freed when the write has returned completely.
A copy on the disk stays when a record is promoted, so that it need not be written again, until the
disk is full. Whoever calls holds the lock of the jobs; it is free while they wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpress.errors import TierError, TierTimeoutError
from kvpress.store.tiers.disk import DiskFile
from kvpress.store.tiers.jobs import Job
from kvpress.store.tiers.loads import Plan
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Record, State


class Moves:
    """The moves of one vault."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._jobs, self._placement = parts, parts.jobs, parts.placement

    def disk(self) -> DiskFile:
        """The disk tier. Raises TierError where there is none."""
        if self._parts.disk is None:
            host = self._placement.host
            raise TierError(
                f"The host tier has no room ({host.held} of {host.size} bytes are held), and there"
                " is no disk tier. Raise host=, or give disk= as in 20GiB:/scratch."
            )
        return self._parts.disk

    def host_place(self, record: Record) -> bool:
        """Reserves a place on the host, making room there; False if that cannot be.

        Raises TierError where making room fails.
        """
        host, placement = self._placement.host, self._placement
        record.host.state = State.RESERVED
        try:
            while (place := host.take(record.bytes)) is None:
                victim = placement.victim() if record.bytes <= host.size else None
                if victim is None:
                    record.host.state = State.ABSENT
                    return False
                self.demote(victim)
        except BaseException:
            record.host.state = State.ABSENT
            raise
        record.host.state, record.host.place = State.FILLING, place
        return True

    def _disk_place(self, disk: DiskFile, record: Record) -> int:
        """A place on the disk, where copies of records of the host make room."""
        extents, placement = disk.extents, self._placement
        while (place := extents.take(record.bytes)) is None:
            spare = placement.spare()
            if spare is not None:
                placement.drop_disk(spare)
                continue
            room: Callable[[], bool] = lambda: extents.largest >= record.bytes  # noqa: E731
            if not placement.leaving or not self._jobs.wait(room, self._parts.deadline_s):
                raise TierError(
                    f"The disk tier in {disk.folder} is full: {extents.held} of {extents.size}"
                    f" bytes are held, {record.bytes} are needed in one piece. Raise its size."
                )
        return place

    def demote(self, record: Record) -> None:
        """Host to disk: writes the record if the disk does not hold it, then frees its place."""
        if not (record.disk.sealed or record.saved.sealed):
            job = record.write or self.write(record, record.host.place)
            self.finish(job, f"{record} was not written")
        lower = record.disk.sealed or record.saved.sealed
        if record.host.sealed and lower and not record.host.pins:
            self._placement.drop_host(record)
            self._jobs.told()

    def write(self, record: Record, source: int, ended: Callable[[], None] | None = None) -> Job:
        """Begins to write a record whose bytes are at `source` of the arena.

        ended: called with the lock when the bytes are not needed any more.
        """
        disk = self.disk()
        place = self._disk_place(disk, record)
        if record.freed or record.disk.state is not State.ABSENT:  # others did it while this waited
            disk.extents.give(place)
            return record.write or Job.nothing()
        record.disk.state, record.disk.place = State.RESERVED, place
        seconds = 0.0

        def fill() -> bool:
            record.disk.state = State.FILLING
            return True

        def run(items: object) -> list[None]:
            nonlocal seconds
            begun = time.perf_counter()
            disk.write(place, source, record.bytes)
            seconds = time.perf_counter() - begun
            self._parts.counters.note("write to the disk", begun, record.bytes)
            return [None]

        def end(error: BaseException | None) -> None:
            record.write = None
            if error is None:
                record.disk.state = State.SEALED
                self._parts.counters.to_disk.add(record.bytes, seconds)
            else:
                self._failed(job)
                self._placement.drop_disk(record)
            if ended is not None:
                ended()
            self._placement.settle(record)

        job = record.write = Job(run, fill, end)
        self._jobs.store(job)
        return job

    def promote(self, record: Record) -> None:
        """Disk to host: reads and verifies; the copy on the disk stays."""
        jobs, host = self._jobs, record.host
        moving = (State.RESERVED, State.FILLING)
        if host.state in moving and not jobs.wait(
            lambda: host.state not in moving, self._parts.deadline_s
        ):
            raise TierTimeoutError(f"{record} is being promoted, and not done in time.")
        self._placement.known(record)
        if host.sealed:
            return self._placement.touch(record)
        copy, file = self._parts.below(record)
        plan = Plan(record, range(record.slices), copy, file, whole=True)
        copy.pins += 1
        try:
            fits = self.host_place(record)
        except BaseException:
            self._unpin(plan)
            raise
        if not fits:
            self._unpin(plan)
            held = self._placement.host
            raise TierError(
                f"{record} does not fit into the host tier: {held.held} of {held.size} bytes are"
                " held by records that are read now. Release their tickets, or raise host=."
            )

        def end(error: BaseException | None) -> None:
            if error is None:
                self.sealed_on_host(record)
                self._parts.counters.to_host.add(record.bytes)
            else:
                self._failed(job)
                self._placement.drop_host(record)
            self._unpin(plan)

        plan.place = host.place
        job = Job(self._parts.loader.load, ended=end, item=[plan], size=plan.bytes)
        jobs.load(job, 0)
        self.finish(job, f"{record} was not read")

    def sealed_on_host(self, record: Record) -> None:
        """All bytes of a record are in its place on the host."""
        record.host.state = State.SEALED
        self._placement.touch(record)

    def finish(self, job: Job, what: str) -> None:
        """Waits for a job until the deadline, and raises what it raised, or TierTimeoutError."""
        if not self._jobs.wait(lambda: job.done, self._parts.deadline_s):
            self._jobs.cancel(job)
            with self._jobs.lock:
                self._parts.counters.timeouts += 1
            raise TierTimeoutError(
                f"{what} within {self._parts.deadline_s} s. The disk is slow or hangs."
            )
        if job.error is not None:
            raise job.error

    def _failed(self, job: Job) -> None:
        self._parts.counters.failures += not job.cancelled

    def _unpin(self, plan: Plan) -> None:
        plan.copy.pins -= 1
        self._placement.settle(plan.record)
