"""What steps chose and was read from the disk: it stays where it was read to while there is room.

A step mostly chooses what the step before chose. The space is that which reads and writes of the
disk pass through, most of which is free most of the time: whoever needs it takes it, from what was
used longest ago. Whoever calls holds the lock of the jobs.
"""

from __future__ import annotations

from kvpress.store.tiers.record import Record, Region


class Kept:
    """Regions of the space that reads pass through, the one used longest ago first."""

    def __init__(self) -> None:
        self._used: dict[Region, None] = {}
        self.held = 0  # bytes

    def add(self, record: Record, region: Region) -> None:
        """Slices of a record, verified, are at hand now."""
        self._used[region] = None
        self.held += region.size
        record.kept.update(dict.fromkeys(region.begins, region))

    def touch(self, region: Region) -> None:
        """A region was used now."""
        del self._used[region]
        self._used[region] = None

    def spare(self) -> Region | None:
        """Which goes first: of those that nobody reads, the one used longest ago."""
        return next((region for region in self._used if not region.pins), None)

    def drop(self, region: Region) -> None:
        """A region is about to be free."""
        del self._used[region]
        self.held -= region.size
        kept = region.record.kept
        for index in [index for index in region.begins if kept.get(index) is region]:
            del kept[index]

    def of(self, record: Record) -> list[Region]:
        """Those of a record that nobody reads."""
        return [region for region in dict.fromkeys(record.kept.values()) if not region.pins]
