"""Pages whose bytes are in the host's memory: pinned there until they have been copied."""

from __future__ import annotations

import threading

from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Copy, Record, Region


class AtHand:
    """Pages of some records that need not be read: they stay where they are until `release`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.begins: list[int] = []  # in the arena
        self.to: list[int] = []  # where they go
        self._pinned: list[tuple[Record, Copy | Region]] = []

    @property
    def lock(self) -> threading.RLock:
        """To be held by whoever adds."""
        return self._parts.jobs.lock

    def add(self, record: Record, index: int, offset: int, to: int) -> bool:
        """Takes in a page, by its slice and where it begins there, if it is at hand.

        Raises TierError for a record that is not there.
        """
        parts = self._parts
        parts.placement.known(record)
        at: Copy | Region | None = record.host if record.host.sealed else record.kept.get(index)
        if at is None:
            return False
        if isinstance(at, Region):
            parts.kept.touch(at)
            begin = at.begins[index]
        else:
            parts.placement.touch(record)
            begin = at.place + record.begin(index)
        at.pins += 1
        parts.counters.hits += 1
        parts.counters.from_host.add(record.slice_bytes)
        self._pinned.append((record, at))
        self.begins.append(begin + offset)
        self.to.append(to)
        return True

    def release(self) -> None:
        """Ends that, and leaves nothing here; a second call does nothing."""
        pinned, self._pinned, self.begins, self.to = self._pinned, [], [], []
        if not pinned:
            return
        with self.lock:
            for record, at in pinned:
                at.pins -= 1
                self._parts.placement.settle(record)
            self._parts.jobs.told()
