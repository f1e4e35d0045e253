"""What a vault is made of, as its reads and its moves share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpress.store.tiers.counters import Counters
from kvpress.store.tiers.disk import DiskFile
from kvpress.store.tiers.extents import Extents
from kvpress.store.tiers.host import Arena
from kvpress.store.tiers.jobs import Jobs
from kvpress.store.tiers.kept import Kept
from kvpress.store.tiers.loads import Loader, Plan
from kvpress.store.tiers.placement import Placement
from kvpress.store.tiers.reading import ReadFile
from kvpress.store.tiers.record import Copy, Record, Region


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
    kept: Kept = field(default_factory=Kept)

    def below(self, record: Record) -> tuple[Copy, ReadFile]:
        """The copy of a record that is read where the host has none, and its file."""
        if record.disk.sealed and self.disk is not None:
            return record.disk, self.disk
        assert record.file is not None, "every record has a sealed copy"
        return record.saved, record.file

    def take_bounce(self, size: int) -> int:
        """A place of the bounce space, for which what is kept goes; -1 if there is no room now."""
        while (place := self.bounce.take(size)) is None:
            spare = self.kept.spare()
            if spare is None:
                return -1
            self._give_kept(spare)
        self.bounced[place] = self.bounce.taken[place]
        return place

    def take_places(self, sizes: Sequence[int]) -> list[int]:
        """Places of the bounce space for all of these; none if there is no room for all now."""
        places: list[int] = []
        for size in sizes:
            place = self.take_bounce(size)
            if place < 0:
                for taken in places:  # nobody is told: it is not more than there was
                    del self.bounced[taken]
                    self.bounce.give(taken)
                return []
            places.append(place)
        return places

    def wait_bounce(self, size: int) -> int:
        """The same, once others have ended; -1 if they have not until the deadline."""
        place = -1

        def taken() -> bool:
            nonlocal place
            place = self.take_bounce(size)
            return place >= 0

        self.jobs.wait(taken, self.deadline_s)
        return place

    def keep(self, plan: Plan) -> None:
        """Leaves what was read in its place, as long as nobody else needs that."""
        record, size, before = plan.record, self.bounced[plan.place], self.kept.of(plan.record)
        self.kept.add(record, Region(record, plan.place, size, plan.found()))
        for region in before:
            if region not in record.kept.values():  # all that it has was read once more
                self._give_kept(region)

    def forget(self, record: Record) -> None:
        """Nobody wants a record any more."""
        for region in self.kept.of(record):
            self._give_kept(region)

    def _give_kept(self, region: Region) -> None:
        self.kept.drop(region)
        del self.bounced[region.place]
        self.bounce.give(region.place)

    def give_bounce(self, place: int) -> None:
        """Frees a place of the bounce space."""
        del self.bounced[place]
        self.bounce.give(place)
        self.jobs.told()
