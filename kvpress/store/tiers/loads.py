"""Reading records from the disk: what is read of them, what it must be, and what it is instead."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from kvpress.errors import TierError, TierIntegrityError
from kvpress.formulas.sizes import round_up
from kvpress.store.tiers.counters import Counters
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.host import Arena
from kvpress.store.tiers.reading import ReadFile, Row
from kvpress.store.tiers.record import Copy, Record, describe

ENDED = -1  # the status of a read whose file ended before it did


class Plan:
    """The reads that some slices of a record need, and where in the arena they go.

    copy: the one that is read, in `file`. Only the ranges of the slices are read, widened to whole
    units, where that is at most half of the record; the record as a whole otherwise, and where it
    is asked for. bytes: of the arena that this needs. place: of those bytes, once it is known.
    """

    def __init__(
        self,
        record: Record,
        slices: Sequence[int],
        copy: Copy,
        file: ReadFile,
        whole: bool = False,
    ) -> None:
        self.copy, self.file = copy, file
        self.record, self.place, self.bytes = record, -1, record.bytes
        self._slices, self._spans = slices, []
        if whole or 2 * len(slices) * record.slice_bytes > record.bytes:
            return
        begins = record.begins(0, slices)
        spans = [(b // UNIT * UNIT, round_up(b + record.slice_bytes, UNIT)) for b in begins]
        size = sum(end - begin for begin, end in spans)
        if 2 * size <= record.bytes:
            self._spans, self.bytes = spans, size

    def begins(self) -> Sequence[int]:
        """Where the slices begin in the arena, in bytes."""
        if not self._spans:
            return self.record.begins(self.place, self._slices)
        begins, at = [], self.place
        for i, (begin, end) in zip(self._slices, self._spans, strict=True):
            begins.append(at + self.record.begin(i) - begin)
            at += end - begin
        return begins

    def found(self) -> dict[int, int]:
        """Where in the arena slices are that were read, by their numbers: all of a whole record."""
        if self._spans:
            return dict(zip(self._slices, self.begins(), strict=True))
        return dict(enumerate(self.record.begins(self.place, range(self.record.slices))))

    def rows(self) -> list[Row]:
        """The reads of `ops.read_records`."""
        record, at, place = self.record, self.copy.place, self.place
        if not self._spans:
            return [_row(at, record.bytes, place, 0, record.bytes, record.digest)]
        rows = []
        for i, (begin, end) in zip(self._slices, self._spans, strict=True):
            checked = record.begin(i) - begin, record.slice_bytes, record.digests[i]
            rows.append(_row(at + begin, end - begin, place, *checked))
            place += end - begin
        return rows


class Loader:
    """Reads of one store into its arena, verified and counted. lock: of its counters."""

    def __init__(
        self, arena: Arena, store: bytes, counters: Counters, lock: threading.RLock
    ) -> None:
        self._arena, self._store, self._counters, self._lock = arena, store, counters, lock

    def load(self, reads: Sequence[Sequence[Plan]]) -> list[TierError | None]:
        """Does some reads of one or more plans, those of one file in one call.

        Gives the first error of each, of which a TierIntegrityError says that bytes are not those
        that were written, also read again past the page cache.
        """
        found: list[TierError | None] = []
        plans = itertools.chain.from_iterable(reads)
        for file, some in itertools.groupby(plans, lambda plan: plan.file):
            found += self._load(file, list(some))
        each = iter(found)
        return [next(filter(None, list(itertools.islice(each, len(x)))), None) for x in reads]

    def _load(self, file: ReadFile, plans: Sequence[Plan]) -> list[TierError | None]:
        begun, rows = time.perf_counter(), [plan.rows() for plan in plans]
        arena_X = self._arena.tensor_X
        found = iter(file.read([row for some in rows for row in some], arena_X))
        statuses = [list(itertools.islice(found, len(some))) for some in rows]
        seconds = (time.perf_counter() - begun) / len(plans)
        self._counters.note("read from the disk", begun, sum(plan.bytes for plan in plans))
        return [
            self._checked(plan, some, status, seconds)
            for plan, some, status in zip(plans, rows, statuses, strict=True)
        ]

    def _checked(
        self, plan: Plan, rows: list[Row], statuses: list[int], seconds: float
    ) -> TierError | None:
        again, counters = any(statuses), self._counters
        if again:
            statuses = plan.file.read(rows, self._arena.tensor_X, again=True)
        error = failure(plan, rows, statuses, self._store) if any(statuses) else None
        with self._lock:
            counters.rereads += again
            counters.integrity_failures += isinstance(error, TierIntegrityError)
            if error is None:
                counters.from_disk.add(plan.bytes, seconds)
                counters.verified += sum(row[4] for row in rows)
        return error


def failure(plan: Plan, rows: list[Row], statuses: list[int], store: bytes) -> TierError:
    """What to say of reads of which some failed. store: the id of who asks."""
    both = zip(rows, statuses, strict=True)
    row, status = next((row, status) for row, status in both if status)
    if status > 0:
        return plan.file.failed(status, row[0], row[1])
    record, place = plan.record, plan.copy.place
    found = describe(plan.file.peek(place, record.header_bytes), store)
    reason = "the file ends before it does" if status == ENDED else "its checksum is wrong"
    return TierIntegrityError(
        f"{record} cannot be used: {reason}, also when read again past the page cache. Expected:"
        f" xxh3-128 {record.digest.hex()} at {place} of {plan.file.where}, store {store.hex()}."
        f" Found: {found}. Compute the sequence anew; check the disk."
    )


def _row(offset: int, size: int, place: int, begin: int, checked: int, digest: bytes) -> Row:
    """A read of `ops.read_records`. digest: the xxh3-128 of the checked range, high half first."""
    low, high = (int.from_bytes(half, "big", signed=True) for half in (digest[8:], digest[:8]))
    return offset, size, place, begin, checked, low, high
