"""Which tier pages are in: the device while there is room, the host and the disk after that.

Where a page is decides what it costs to read, never what is read: rows are attended to part by
part, always the same parts (store/streamed.py).
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from kvpress.errors import CacheError, TierError
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.arrivals import Tenant
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.counters import Uses
from kvpress.store.tiers.data_file import Source
from kvpress.store.tiers.host import CopyEngine, copies
from kvpress.store.tiers.record import Facts
from kvpress.store.tiers.shelf import Shelf
from kvpress.store.tiers.vault import Vault
from kvpress.store.tiers.watch import Stopwatch, Watcher

TIERS = ("device", "host", "disk")
_STAGING = 16  # a sixteenth of the device for each half of what is on its way
_MOST_STAGING = 2**24  # bytes of a half: more at once is not faster
_MORE = 64  # this part of the device is made free beyond what is needed, so that it is done rarely


class Reader(Protocol):
    """Rows that read pages before they are attended to."""

    device: torch.device

    def bytes_beside(self, anew: bool) -> int:
        """Bytes on the device besides pages: as they are now, or as they were counted last."""

    def read_ahead(self) -> None:
        """Starts to read what will be needed first."""


class Tiers:
    """The pages of all caches of an engine, within `caps`; the device's are those of each device.

    facts: what else decides which bytes a page may hold; it stands in every record. unit_bytes: the
    most that rows read at once, where that is known. engine: of copies between host and device.
    """

    def __init__(
        self, caps: Caps, facts: str, unit_bytes: int = 0, engine: CopyEngine | None = None
    ) -> None:
        self._unit_bytes = unit_bytes
        self.caps, self.lock, self.engine = caps, threading.RLock(), engine or copies()
        self.tenants: WeakSet[Tenant] = WeakSet()
        self.readers: WeakSet[Reader] = WeakSet()
        self._arenas: dict[torch.device, Arena] = {}
        self._shelves: dict[tuple[torch.device, int, int], Shelf] = {}
        self._next: WeakKeyDictionary[Reader, weakref.ref[Reader]] = WeakKeyDictionary()
        self._last: weakref.ref[Reader] | None = None
        self.stalls, self.uses = Stopwatch(), Uses()
        self.watcher: Watcher | None = None
        self._steps = 0
        self._dropped = False  # whether caches are gone whose rows may still be there
        self.copies = ThreadPoolExecutor(1, "kvpress-copy")
        weakref.finalize(self, self.copies.shutdown, wait=False)
        self.vault: Vault | None = None
        self.facts = Facts(facts)
        self._source: Source | None = None
        if caps.host or caps.disk:
            self.vault = Vault(self.facts, caps.host, caps.disk, engine=self.engine)

    def __deepcopy__(self, memo: object) -> Tiers:
        return self  # an engine has one

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Bytes of pages on all devices, and of what is set aside there for reading others."""
        with self.lock:
            arenas, shelves = list(self._arenas.values()), list(self._shelves.values())
        aside = sum(2 * arena.half for arena in arenas)
        return sum(arena.used for arena in arenas), aside + sum(x.nbytes for x in shelves)

    def watch(self, watcher: Watcher | None) -> None:
        """Tells somebody, or from now on nobody, of everything that takes time."""
        self.watcher = self.uses.watcher = self.stalls.watcher = watcher
        if self.vault is not None:
            self.vault.watch(watcher)

    def close(self) -> None:
        """Frees host memory, file and folder now; what is there cannot be read any more."""
        self.copies.shutdown()
        if self.vault is not None:
            self.vault.close()

    def shelf(self, device: torch.device, page_bytes: int, beside: int, unit_bytes: int) -> Shelf:
        """Where pages of this size are kept. unit_bytes: what is read at once, at least.

        beside: bytes that a page has in records besides.

        Raises TierError where the caps are too small for that.
        """
        key = (device, page_bytes, beside)
        with self.lock:
            if device not in self._arenas:
                unit = max(unit_bytes, self._unit_bytes)
                half = max(unit, min(_MOST_STAGING, self.caps.device // _STAGING))
                self._check(2 * half, unit)
                self._arenas[device] = Arena(self.caps.device, half, device)
            arena = self._arenas[device]
            if unit_bytes > arena.half:
                raise TierError(
                    f"device={self.caps.device}: a span of all heads has {unit_bytes} bytes, but"
                    f" {arena.half} were set aside for what is on its way. Raise device= to"
                    f" {_STAGING * unit_bytes}."
                )
            if key not in self._shelves:
                self._shelves[key] = Shelf(self, arena, page_bytes, beside)
            return self._shelves[key]

    def _check(self, needed: int, unit_bytes: int) -> None:
        if needed > self.caps.device:
            raise TierError(
                f"device={self.caps.device} bytes are too few: {unit_bytes} are read at once, and"
                f" what is read next has a place too. Give at least device={needed}, and an open"
                " span for every layer and sequence besides."
            )

    @contextmanager
    def reading(self, source: Source) -> Iterator[None]:
        """Rows that are loaded in the block have their pages in this file."""
        with self.lock:
            self._source = source
            try:
                yield
            except BaseException:
                self.note_dropped()
                raise
            finally:
                self._source = None

    def source(self, session: Tensor | None) -> Source:
        """The file that is being read, whose id this is. Raises CacheError for another one."""
        named = None if session is None or session.dtype != torch.uint8 else session.tolist()
        if self._source is None or named != list(self._source.id):
            raise CacheError("The pages are not those of the session that is read.")
        return self._source

    def fits(self, room: int, arena: Arena) -> bool:
        """Whether a device has so many bytes free now: beside pages it holds what rows write to."""
        if self._free(arena) < room:
            self.end_dropped()
        return self._free(arena) >= room

    def _free(self, arena: Arena) -> int:
        return arena.free - self._beside(arena, anew=True)

    def _beside(self, arena: Arena, anew: bool) -> int:
        """Bytes of a device besides pages."""
        return sum(x.bytes_beside(anew) for x in self.readers if x.device == arena.device)

    def make_room(self, room: int, arena: Arena, first: Tenant | None) -> None:
        """Frees so many bytes of a device where it can; of these rows before those of others."""
        if self.fits(room, arena):
            return
        self.collect()
        if self.vault is None:
            return
        for tenant in self._others(first, arena):
            missing = room + arena.size // _MORE - self._free(arena)
            if missing <= arena.size // _MORE and tenant is not first:
                return
            if missing > 0:
                tenant.spill(missing)

    def make_space(self, room: int, arena: Arena, first: Tenant) -> int:
        """Frees as many bytes, as far as pages are there that no last step chose. Returns them.

        Rows that are read one after the other would otherwise take each other's pages in turn.
        """
        # What leaves are pages, and what rows have beside changes in their own steps.
        beside = self._beside(arena, anew=False)
        missing = room - (arena.free - beside)
        for shelf in self._shelves.values():
            if missing > 0 and shelf.arena is arena:
                missing -= shelf.thin(missing)
        others = self._others(first, arena) if missing > 0 else []
        for tenant in others:
            if (missing := room - (arena.free - beside)) > 0:
                tenant.thin(missing)
        return max(0, min(room, arena.free - beside))

    def _others(self, first: Tenant | None, arena: Arena) -> list[Tenant]:
        """Who has pages there: `first` before the others."""
        others = (tenant for tenant in self.tenants if tenant is not first)
        mine = [tenant for tenant in others if tenant.shelf.arena is arena]
        return mine if first is None else [first, *mine]

    def tick(self) -> int:
        """The number of a step of some rows: later ones have larger numbers."""
        self._steps += 1
        return self._steps

    def passed(self, rows: Reader) -> None:
        """Says that rows are attended to now: those after which they come learn who follows."""
        last = self._last() if self._last else None
        if last is not None and last is not rows:
            self._next[last] = weakref.ref(rows)
        self._last = weakref.ref(rows)

    def read_ahead(self, rows: Reader) -> None:
        """Starts to read what the rows need that followed these the last time."""
        following = self._next.get(rows)
        reader = following() if following else None
        if reader is not None:
            reader.read_ahead()

    def note_dropped(self) -> None:
        """Says that a cache is gone; Python may keep its rows until it looks for cycles."""
        self._dropped = True

    def end_dropped(self) -> None:
        """Frees the pages of caches that are gone, if there are some: when room is needed."""
        if self._dropped:
            self._dropped = False
            gc.collect()
            self.collect()

    def collect(self) -> None:
        """Frees what no rows hold any more."""
        with self.lock:
            for shelf in self._shelves.values():
                shelf.collect([t.ids_in_use() for t in self.tenants if t.shelf is shelf])

    def full(self, room: int) -> TierError:
        """What to say where the device is full."""
        held = sum(arena.used for arena in self._arenas.values())
        lower = "" if self.vault else " There is no lower tier: give host= or disk= too."
        return TierError(
            f"device={self.caps.device} bytes: {held} are in use and {room} more are needed at"
            f" once.{lower} Raise device=, or read fewer or shorter sequences at once."
        )
