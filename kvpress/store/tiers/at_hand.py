"""Pages whose bytes are in the host's memory: held there until they have been copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Copy, Record, Region
from kvpress.store.tiers.ticket import Ticket


class Asked(NamedTuple):
    """Pages of a record that are to be copied.

    slices: in which each is. offsets: where it begins in that, in bytes. to: where it goes. chosen:
    whether a step chose one of them, so that it is asked for again.
    """

    record: Record
    slices: Sequence[int]
    offsets: Sequence[int]
    to: Sequence[int]
    chosen: bool = False


class AtHand:
    """Pages of some records that are there to be copied: they stay where they are until `release`.

    Those that need not be read, and those of reads that have ended.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.begins: list[int] = []  # in the arena
        self.to: list[int] = []  # where they go
        self._pinned: list[tuple[Record, Copy | Region]] = []
        self._tickets: list[Ticket] = []

    def find(self, asked: Iterable[Asked]) -> list[Asked]:
        """Takes in the pages that need not be read, and gives the others.

        Raises TierError for a record that is not there.
        """
        parts, left = self._parts, list[Asked]()
        before, found = len(self.to), 0
        with parts.jobs.lock:
            for own in asked:
                record = own.record
                parts.placement.known(record)
                count = len(self.to)
                if record.host.sealed:
                    parts.placement.touch(record)
                    self._take(own, record.host, record.begins(record.host.place, own.slices))
                elif record.kept:
                    left += self._take_kept(own)
                else:
                    left.append(own)
                found += (len(self.to) - count) * record.slice_bytes
            parts.counters.hits += len(self.to) - before
            parts.counters.from_host.add(found, count=len(self.to) - before)
        return left

    def _take(self, own: Asked, at: Copy | Region, begins: Iterable[int]) -> None:
        at.pins += 1
        self._pinned.append((own.record, at))
        both = zip(begins, own.offsets, strict=True)
        self.begins.extend(begin + offset for begin, offset in both)
        self.to.extend(own.to)

    def _take_kept(self, own: Asked) -> list[Asked]:
        """Takes in what was read lately, and gives the rest, if there is some."""
        rest: list[tuple[int, int, int]] = []
        for page in zip(own.slices, own.offsets, own.to, strict=True):
            region = own.record.kept.get(page[0])
            if region is None:
                rest.append(page)
                continue
            self._parts.kept.touch(region)
            region.pins += 1
            self._pinned.append((own.record, region))
            self.begins.append(region.begins[page[0]] + page[1])
            self.to.append(page[2])
        if not rest:
            return []
        slices, offsets, to = zip(*rest, strict=True)
        return [Asked(own.record, slices, offsets, to, own.chosen)]

    def add(self, ticket: Ticket, pages: Iterable[tuple[int, int, int]]) -> None:
        """Takes in what a ticket read, which ends with the others.

        pages: of each the place of its slice among those of the ticket, where it begins in that,
        and where it goes. Waits; raises what `Ticket.begins` does.
        """
        begins = ticket.begins()
        self._tickets.append(ticket)
        for index, offset, to in pages:
            self.begins.append(begins[index] + offset)
            self.to.append(to)

    def release(self) -> None:
        """Ends that, and leaves nothing here; a second call does nothing."""
        pinned, tickets = self._pinned, self._tickets
        self._pinned, self._tickets, self.begins, self.to = [], [], [], []
        if not pinned and not tickets:
            return
        with self._parts.jobs.lock:
            for record, at in pinned:
                at.pins -= 1
                self._parts.placement.settle(record)
            for ticket in tickets:
                ticket.release()
            self._parts.jobs.told()
