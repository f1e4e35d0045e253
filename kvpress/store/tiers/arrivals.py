"""Pages of lower tiers on their way to a device: what is read of records, and where it lands."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from kvpress.errors import TierError
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.at_hand import Asked, AtHand
from kvpress.store.tiers.counters import Uses
from kvpress.store.tiers.data_file import Source
from kvpress.store.tiers.directory import NOWHERE, Directory
from kvpress.store.tiers.host import CopyEngine
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.ticket import Ticket, Wanted
from kvpress.store.tiers.vault import Vault
from kvpress.store.tiers.watch import Stopwatch


class Tenant(Protocol):
    """Rows whose pages are on a shelf."""

    @property
    def shelf(self) -> Any:
        """Theirs."""

    def ids_in_use(self) -> Tensor:
        """The numbers of their pages on the shelf: int64, on the host; some may stand twice."""

    def spill(self, least: int) -> None:
        """Sends whole spans to a lower tier, of at least so many bytes where there are as many."""

    def thin(self, least: int) -> None:
        """The same of pages without a copy below that its last step did not choose to read."""


class Around(Protocol):
    """What the shelves of an engine share."""

    vault: Vault | None
    engine: CopyEngine
    copies: ThreadPoolExecutor  # of one thread: one copy after the other, as of a stream
    stalls: Stopwatch  # of what waits for copies
    uses: Uses
    lock: threading.RLock
    tenants: WeakSet[Tenant]

    def fits(self, room: int, arena: Arena) -> bool:
        """Whether a device has so many bytes free now."""

    def make_room(self, room: int, arena: Arena, first: Tenant | None) -> None:
        """Frees so many bytes of a device where it can; of these rows before those of others."""

    def make_space(self, room: int, arena: Arena, first: Tenant) -> int:
        """Frees as many bytes as no last step chose, at the most. Returns how many are free."""

    def tick(self) -> int:
        """The number of a step of some rows."""

    def end_dropped(self) -> None:
        """Frees the pages of caches that are gone."""

    def full(self, room: int) -> TierError:
        """What to say where the device is full."""

    def source(self, session: Tensor | None) -> Source:
        """The data file of the session that is being loaded. Raises CacheError for another one."""


class Reading(NamedTuple):
    """A read of some records.

    pages: of each the place of its slice among those that are read, where it begins in that, and
    where it goes.
    """

    ticket: Ticket
    pages: list[tuple[int, int, int]]

    @classmethod
    def of(cls, ticket: Ticket, far: Mapping[Record, Asked]) -> Reading:
        """The read of a ticket. far: the pages that are read of all records."""
        pages, first = list[tuple[int, int, int]](), 0
        for wanted in ticket.wanted:
            own = far[wanted.record]
            at = {which: first + i for i, which in enumerate(wanted.slices)}
            each = zip(own.slices, own.offsets, own.to, strict=True)
            pages += [(at[which], offset, to) for which, offset, to in each]
            first += len(at)
        return cls(ticket, pages)


class Arrivals:
    """Reads of pages of one size. beside: bytes that a slice has for each page besides."""

    def __init__(self, tiers: Around, directory: Directory, page_bytes: int, beside: int) -> None:
        self._tiers, self._directory = tiers, directory
        self._page_bytes, self._beside = page_bytes, beside

    @property
    def _vault(self) -> Vault:
        assert self._tiers.vault is not None, "only a vault has records"
        return self._tiers.vault

    def read(self, id_A: Tensor, to_A: Tensor, target_PX: Tensor, together: int) -> None:
        """Reads pages to where they go; so many records are asked for at once.

        Raises TierError.
        """
        near, far = self._find(id_A, to_A)
        for start in range(0, max(1, len(far)), together):
            some = dict(islice(far.items(), start, start + together))
            self._land(near, self._fetch(near, some), target_PX)

    def begin(self, id_A: Tensor, to_A: Tensor, target_PX: Tensor) -> Future[None]:
        """The same in the background. Raises TierError."""
        near, far = self._find(id_A, to_A)
        reads = self._fetch(near, far)
        # An operator may still read what is there.
        fence = self._tiers.engine.fence(target_PX.device)
        return self._tiers.copies.submit(self._land, near, reads, target_PX, fence)

    def bring_ahead(self, id_A: Tensor, to_A: Tensor, target_PX: Tensor) -> Future[None]:
        """The same, of which the caller waits for nothing: also what is read is looked for there.

        No page may lose its record meanwhile.
        """
        asked, fence = self._asked(id_A, to_A), self._tiers.engine.fence(target_PX.device)
        return self._tiers.copies.submit(self._bring, asked, target_PX, fence)

    def _bring(self, asked: Sequence[Asked], target_PX: Tensor, fence: Any) -> None:
        near, far = self._look(asked)
        self._land(near, self._fetch(near, far), target_PX, fence)

    def _find(self, id_A: Tensor, to_A: Tensor) -> tuple[AtHand, dict[Record, Asked]]:
        """The pages that need not be read, and the others by record."""
        return self._look(self._asked(id_A, to_A))

    def _look(self, asked: Sequence[Asked]) -> tuple[AtHand, dict[Record, Asked]]:
        near = self._vault.at_hand()
        try:
            return near, {own.record: own for own in near.find(asked)}
        except BaseException:
            near.release()
            raise

    def _asked(self, id_A: Tensor, to_A: Tensor) -> list[Asked]:
        """What is asked of each record: its pages are many, and looked at together."""
        own, each = self._directory, self._page_bytes + self._beside
        order_A = own.by_record(id_A)
        id_A = id_A[order_A]
        numbers, counts = torch.unique_consecutive(own.record_P[id_A], return_counts=True)
        columns = (own.place_P[id_A], to_A[order_A], own.step_P[id_A] != NOWHERE)
        places, to, chosen = (x.tolist() for x in columns)
        asked, begin = list[Asked](), 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            record, end = own.records[number], begin + count
            pages = record.slice_bytes // each  # of a slice
            slices, offsets = places[begin:end], [0] * (end - begin)
            if pages > 1:
                offsets = [place % pages * self._page_bytes for place in slices]
                slices = [place // pages for place in slices]
            asked.append(Asked(record, slices, offsets, to[begin:end], any(chosen[begin:end])))
            begin = end
        return asked

    def _fetch(self, near: AtHand, far: Mapping[Record, Asked]) -> list[Reading]:
        """Begins to read from the lower tiers; whatever fails, nothing stays pinned."""
        try:
            wanted = [Wanted(x.record, sorted(set(x.slices)), x.chosen) for x in far.values()]
            tickets = self._vault.fetch_all(wanted)
        except BaseException:
            near.release()
            raise
        self._tiers.uses.disk += sum(len(own.to) for own in far.values())
        return [Reading.of(ticket, far) for ticket in tickets]

    def _land(
        self, near: AtHand, reads: Sequence[Reading], target_PX: Tensor, fence: Any = None
    ) -> None:
        """Copies pages to where they go; whatever fails, nothing stays pinned."""
        try:
            self._tiers.engine.after(fence)
            self._tiers.uses.host += len(near.to)
            for read in reads:
                if not read.ticket.ready:  # it may wait for the space of what is there
                    self._copy(near, target_PX)
                near.add(read.ticket, read.pages)
            self._copy(near, target_PX)
        except BaseException:
            self._give_up(near, reads)
            raise

    def _copy(self, near: AtHand, target_PX: Tensor) -> None:
        """Copies what is at hand, and ends it."""
        if near.to:
            begun = perf_counter()
            arena_X = self._vault.arena_X
            self._tiers.engine.gather(target_PX, near.to, arena_X, near.begins).wait()
            self._tiers.uses.copied(len(near.to) * self._page_bytes, begun)
            near.release()

    @staticmethod
    def _give_up(near: AtHand, reads: Sequence[Reading]) -> None:
        near.release()
        for read in reads:
            read.ticket.release()


class Arriving:
    """Pages on their way, and the numbers that they will have.

    lost: whether others were sent to the same places before these were used.
    """

    def __init__(self, at_A: Tensor, copied: Future[None] | None, tiers: Around) -> None:
        self._at_A, self._copied, self._tiers = at_A, copied, tiers
        self.lost = False

    def end(self) -> None:
        """Returns when nothing is on its way any more, whether it has failed or not."""
        if self._copied is not None:
            wait([self._copied])

    def wait(self) -> Tensor:
        """The numbers, once the pages are there. Raises TierError."""
        if self._copied is not None:
            with self._tiers.stalls:
                self._copied.result()
        return self._at_A
