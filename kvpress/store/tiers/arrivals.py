"""Pages of lower tiers on their way to a device: what is read of records, and where it lands."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor

from kvpress.errors import TierError
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.at_hand import AtHand
from kvpress.store.tiers.counters import Uses
from kvpress.store.tiers.data_file import Source
from kvpress.store.tiers.directory import NOWHERE, Directory
from kvpress.store.tiers.host import CopyEngine
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.ticket import Ticket
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


class Wanted:
    """Pages that are read of one record. keep: whether a step chose one of them."""

    def __init__(self, record: Record) -> None:
        self.record, self.keep = record, False
        self.pages: list[tuple[int, int]] = []  # their slices, and where they begin in these
        self.to: list[int] = []  # where they go

    def add(self, which: int, offset: int, to: int, keep: bool) -> None:
        self.pages.append((which, offset))
        self.to.append(to)
        self.keep |= keep

    def slices(self) -> list[int]:
        """The slices that are read: each once."""
        return sorted({which for which, _ in self.pages})


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
            part = far[start : start + together]
            self._land(near, part, self._fetch(near, part), target_PX)

    def begin(self, id_A: Tensor, to_A: Tensor, target_PX: Tensor) -> Future[None]:
        """The same in the background. Raises TierError."""
        near, far = self._find(id_A, to_A)
        tickets = self._fetch(near, far)
        # An operator may still read what is there.
        fence = self._tiers.engine.fence(target_PX.device)
        return self._tiers.copies.submit(self._land, near, far, tickets, target_PX, fence)

    def _find(self, id_A: Tensor, to_A: Tensor) -> tuple[AtHand, list[Wanted]]:
        """The pages that need not be read, and the others by record."""
        own, near, far = self._directory, self._vault.at_hand(), dict[int, Wanted]()
        chosen_A = own.step_P[id_A] != NOWHERE
        columns = (own.record_P[id_A], own.place_P[id_A], to_A, chosen_A)
        with near.lock:
            for number, place, to, chosen in zip(*(x.tolist() for x in columns), strict=True):
                record = own.records[number]
                in_slice = record.slice_bytes // (self._page_bytes + self._beside)
                which, offset = place // in_slice, place % in_slice * self._page_bytes
                if not near.add(record, which, offset, to):
                    if number not in far:
                        far[number] = Wanted(record)
                    far[number].add(which, offset, to, chosen)
        return near, list(far.values())

    def _fetch(self, near: AtHand, wanted: list[Wanted]) -> list[Ticket]:
        """Begins to read from the lower tiers; whatever fails, nothing stays pinned."""
        tickets: list[Ticket] = []
        try:
            for want in wanted:
                tickets.append(self._vault.fetch(want.record, want.slices(), keep=want.keep))
        except BaseException:
            near.release()
            for ticket in tickets:
                ticket.release()
            raise
        self._tiers.uses.disk += sum(len(want.to) for want in wanted)
        return tickets

    def _land(
        self,
        near: AtHand,
        wanted: list[Wanted],
        tickets: list[Ticket],
        target_PX: Tensor,
        fence: Any = None,
    ) -> None:
        """Copies pages to where they go; whatever fails, nothing stays pinned."""
        try:
            self._tiers.engine.after(fence)
            self._copy(near.to, near.begins, target_PX)
            self._tiers.uses.host += len(near.to)
            near.release()
            for want, ticket in zip(wanted, tickets, strict=True):
                with ticket:  # the next ones may wait for its space
                    at = dict(zip(want.slices(), ticket.begins(), strict=True))
                    begins = [at[which] + offset for which, offset in want.pages]
                    self._copy(want.to, begins, target_PX)
        finally:
            near.release()
            for ticket in tickets:
                ticket.release()

    def _copy(self, to: list[int], begins: list[int], target_PX: Tensor) -> None:
        if to:
            begun = perf_counter()
            self._tiers.engine.gather(target_PX, to, self._vault.arena_X, begins).wait()
            self._tiers.uses.copied(len(to) * self._page_bytes, begun)


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
