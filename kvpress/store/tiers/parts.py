"""What a vault is made of, as its reads and its moves share it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpress.store.tiers.counters import Counters
from kvpress.store.tiers.disk import DiskFile
from kvpress.store.tiers.extents import Extents
from kvpress.store.tiers.host import Arena
from kvpress.store.tiers.jobs import Jobs
from kvpress.store.tiers.loads import Loader
from kvpress.store.tiers.placement import Placement
from kvpress.store.tiers.reading import ReadFile
from kvpress.store.tiers.record import Copy, Record


@dataclass
class Parts:
    """All of a vault but its rules. The lock of the jobs guards placement, bounce and counters."""

    store: bytes  # the random id that stands in every header
    arena: Arena
    jobs: Jobs
    placement: Placement
    bounce: Extents  # of the arena: what reads and writes of the disk pass through
    disk: DiskFile | None
    counters: Counters
    deadline_s: float
    loader: Loader
    bounced: dict[int, int] = field(default_factory=dict)  # bytes by place, as their users know

    def below(self, record: Record) -> tuple[Copy, ReadFile]:
        """The copy of a record that is read where the host has none, and its file."""
        if record.disk.sealed and self.disk is not None:
            return record.disk, self.disk
        assert record.file is not None, "every record has a sealed copy"
        return record.saved, record.file

    def take_bounce(self, size: int) -> int:
        """A place of the bounce space; -1 if there is no room now."""
        place = self.bounce.take(size)
        if place is None:
            return -1
        self.bounced[place] = self.bounce.taken[place]
        return place

    def give_bounce(self, place: int) -> None:
        """Frees a place of the bounce space."""
        del self.bounced[place]
        self.bounce.give(place)
        self.jobs.told()
