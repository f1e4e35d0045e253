"""Which records there are and where their copies lie: bookkeeping, without a byte being moved.

Whoever calls holds the lock of the jobs. What is decided depends on the order of calls only.
"""

from __future__ import annotations

import heapq

from kvpress.errors import CacheError, TierError
from kvpress.store.tiers.extents import Extents
from kvpress.store.tiers.reading import ReadFile
from kvpress.store.tiers.record import Copy, Entry, Owner, Record, State


class Placement:
    """The records of a vault, and the places of the host and of the disk that they hold."""

    def __init__(self, host: Extents, disk: Extents) -> None:
        self.host, self.disk = host, disk
        self.records: dict[Record, None] = {}  # freed ones too, until nobody reads them any more
        self._used: dict[Record, None] = {}  # those on the host, the one used longest ago first
        self._unused: list[int] = []  # numbers, a heap
        self._generations: list[int] = []  # by number
        self.reserved: dict[int, int] = {}  # bytes by place of the host that no record may have

    def enter(self, owner: Owner, slice_bytes: int) -> Record:
        """A new record without a place."""
        if self._unused:
            number = heapq.heappop(self._unused)
            self._generations[number] += 1
        else:
            number = len(self._generations)
            self._generations.append(1)
        record = Record(number, self._generations[number], owner, slice_bytes)
        self.records[record] = None
        return record

    def adopt(self, file: ReadFile, entry: Entry) -> Record:
        """A new record whose bytes lie in a file that is only read."""
        record = self.enter(entry.owner, entry.slice_bytes)
        record.digests, record.digest, record.file = entry.digests, entry.digest, file
        record.saved.state, record.saved.place = State.SEALED, entry.place
        record.published = True
        return record

    def known(self, record: Record) -> None:
        """Raises TierError unless a record is one of this vault, and not freed."""
        if record.freed or record not in self.records:
            raise TierError(f"{record} is not, or no longer, in this vault.")

    def touch(self, record: Record) -> None:
        """A record of the host was used now."""
        self._used.pop(record, None)
        self._used[record] = None

    def victim(self) -> Record | None:
        """Who leaves the host next: of those that nobody reads, the one used longest ago."""
        return next((r for r in self._used if r.host.sealed and not r.host.pins), None)

    def spare(self) -> Record | None:
        """Whose copy on the disk goes first: it is on the host too, and nobody reads it."""
        both = (r for r in self._used if r.host.sealed and r.disk.sealed)
        return next((r for r in both if not r.disk.pins and not r.freed), None)

    @property
    def leaving(self) -> bool:
        """Whether places of the disk will be free by themselves, once reads have ended."""
        return any(r.freed and r.disk.state is not State.ABSENT for r in self.records)

    def drop_host(self, record: Record) -> None:
        """Frees the place of a copy on the host."""
        self._used.pop(record, None)
        self._drop(record.host, self.host)

    def drop_disk(self, record: Record) -> None:
        """Frees the place of a copy on the disk."""
        self._drop(record.disk, self.disk)

    def _drop(self, copy: Copy, extents: Extents) -> None:
        copy.state = State.EVICTING
        if copy.place >= 0:
            extents.give(copy.place)
        copy.state, copy.place = State.ABSENT, -1

    def free(self, record: Record) -> None:
        """Nobody wants a record any more: it goes when nobody reads or writes it."""
        record.freed = True
        self.settle(record)

    def settle(self, record: Record) -> None:
        """Frees the places of a freed record if nobody reads or writes it."""
        if not record.freed or record.pins or record.write or record not in self.records:
            return
        self.drop_host(record)
        self.drop_disk(record)
        record.saved.state, record.file = State.ABSENT, None
        del self.records[record]
        heapq.heappush(self._unused, record.number)

    def check(self, bounce: dict[int, int], taken: Extents) -> None:
        """Raises CacheError unless every place has one owner and every record a sealed copy.

        bounce, taken: what reads and writes hold of the space that they pass through, as they say
        and as the space does.
        """
        for tier, extents in (("host", self.host), ("disk", self.disk)):
            copies = ((getattr(record, tier), record.bytes) for record in self.records)
            found = {copy.place: size for copy, size in copies if copy.place >= 0}
            extents.check(found | (self.reserved if tier == "host" else {}))
        taken.check(bounce)
        for record in self.records:
            states = (record.host.state, record.disk.state, record.saved.state)
            if record.published and not record.freed and State.SEALED not in states:
                raise CacheError(f"{record} has no sealed copy: {states}")
            for copy in (record.host, record.disk, record.saved):
                there = copy.state not in (State.ABSENT, State.RESERVED)
                if (there and copy.place < 0) or copy.pins < 0:
                    raise CacheError(f"{record}: {copy.state} at {copy.place}, {copy.pins} pins")
        if {r for r in self.records if r.host.sealed} != self._used.keys():
            raise CacheError("the order of use is not that of the records on the host")
