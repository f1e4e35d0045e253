"""What the host and the disk tier have done so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

from kvpress.store.tiers.watch import Watcher


@dataclass
class Flow:
    """What went one way, and arrived: bytes, seconds that moving them took, and how often."""

    bytes: int = 0
    seconds: float = 0.0
    count: int = 0

    def add(self, size: int, seconds: float = 0.0, count: int = 1) -> None:
        self.bytes += size
        self.seconds += seconds
        self.count += count


@dataclass
class Uses:
    """Pages that were asked for, by where they were then, and what was copied to the device."""

    device: int = 0
    host: int = 0
    disk: int = 0
    brought: int = 0  # pages that were copied because a step chose them
    to_device: Flow = field(default_factory=Flow)
    watcher: Watcher | None = None

    def copied(self, size: int, begun: float) -> None:
        """Counts a copy that began then and has ended now."""
        self.to_device.add(size, perf_counter() - begun)
        if self.watcher is not None:
            self.watcher.note("copy to the device", begun, bytes=size)


@dataclass
class Counters:
    """What has succeeded and what has failed since the vault was made.

    to_host: put or promoted. from_host: handed out there. to_disk, from_disk: written, read; with
    headers. hits: fetches that the host answered. stalls: seconds that `wait` blocked. verified:
    bytes whose checksum was right. rereads: reads that were tried a second time. failures: reads
    and writes that failed, timeouts and integrity failures among them. direct: whether reads and
    writes pass the page cache by.
    """

    to_host: Flow = field(default_factory=Flow)
    to_disk: Flow = field(default_factory=Flow)
    from_host: Flow = field(default_factory=Flow)
    from_disk: Flow = field(default_factory=Flow)
    hits: int = 0
    stalls: float = 0.0
    verified: int = 0
    rereads: int = 0
    failures: int = 0
    timeouts: int = 0
    integrity_failures: int = 0
    direct: bool = False
    watcher: Watcher | None = None

    def note(self, what: str, begun: float, size: int) -> None:
        """Tells whoever watches of what has ended."""
        if self.watcher is not None:
            self.watcher.note(what, begun, bytes=size)
