"""Pages whose bytes are in the host's memory: held there until they have been copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Copy, Record, Region
from kvpress.store.tiers.ticket import Ticket


class Page(NamedTuple):
    """A page to be copied. chosen: whether a step chose it, so that it is asked for again."""

    record: Record
    which: int  # of its slices
    offset: int  # in bytes, in that slice
    to: int  # where it goes
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

    def find(self, pages: Iterable[Page]) -> list[Page]:
        """Takes in the pages that need not be read, and gives the others.

        Raises TierError for a record that is not there.
        """
        parts, left = self._parts, []
        before, found = len(self.to), 0
        with self._parts.jobs.lock:
            for page in pages:
                record, index, offset, to, _ = page
                parts.placement.known(record)
                kept = record.kept.get(index)
                if record.host.sealed:
                    at: Copy | Region = record.host
                    parts.placement.touch(record)
                    begin = record.host.place + record.begin(index)
                elif kept is not None:
                    at, begin = kept, kept.begins[index]
                    parts.kept.touch(kept)
                else:
                    left.append(page)
                    continue
                at.pins += 1
                found += record.slice_bytes
                self._pinned.append((record, at))
                self.begins.append(begin + offset)
                self.to.append(to)
            parts.counters.hits += len(self.to) - before
            parts.counters.from_host.add(found, count=len(self.to) - before)
        return left

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
