"""Pages of lower tiers on their way to a device: what is read of records, and where it lands."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from time import perf_counter
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from torch import Tensor

from kvpress.errors import TierError
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.at_hand import AtHand, Page
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
        """The same of pages that its last step did not choose to read."""


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
    def of(cls, ticket: Ticket, far: Mapping[Record, list[Page]]) -> Reading:
        """The read of a ticket. far: the pages that are read of all records."""
        every = ((own.record, which) for own in ticket.wanted for which in own.slices)
        at = {slice_: i for i, slice_ in enumerate(every)}
        pages = chain.from_iterable(far[own.record] for own in ticket.wanted)
        return cls(ticket, [(at[x.record, x.which], x.offset, x.to) for x in pages])


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

    def _find(self, id_A: Tensor, to_A: Tensor) -> tuple[AtHand, dict[Record, list[Page]]]:
        """The pages that need not be read, and the others by record."""
        near, far = self._vault.at_hand(), dict[Record, list[Page]]()
        for page in near.find(self._pages(id_A, to_A)):
            far.setdefault(page.record, []).append(page)
        return near, far

    def _pages(self, id_A: Tensor, to_A: Tensor) -> Iterator[Page]:
        own, each = self._directory, self._page_bytes + self._beside
        columns = (own.record_P[id_A], own.place_P[id_A], to_A, own.step_P[id_A] != NOWHERE)
        for number, place, to, chosen in zip(*(x.tolist() for x in columns), strict=True):
            record = own.records[number]
            which, page = divmod(place, record.slice_bytes // each)
            yield Page(record, which, page * self._page_bytes, to, chosen)

    def _fetch(self, near: AtHand, far: Mapping[Record, list[Page]]) -> list[Reading]:
        """Begins to read from the lower tiers; whatever fails, nothing stays pinned."""
        try:
            tickets = self._vault.fetch_all(
                [
                    Wanted(record, sorted({x.which for x in pages}), any(x.chosen for x in pages))
                    for record, pages in far.items()
                ]
            )
        except BaseException:
            near.release()
            raise
        self._tiers.uses.disk += sum(map(len, far.values()))
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
