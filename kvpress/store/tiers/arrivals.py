"""Pages of lower tiers on their way to a device: what is read of records, and where it lands."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from kvpress.errors import TierError
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.counters import Uses
from kvpress.store.tiers.data_file import Source
from kvpress.store.tiers.directory import Directory
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


class Wanted(NamedTuple):
    """What of one record is read, and where it goes."""

    record: Record
    slices: list[int]
    place_A: Tensor  # pages among those of the slices read: int64
    to_A: Tensor  # where they go: int64


class Arrivals:
    """Reads of pages of one size. beside: bytes that a slice has for each page besides."""

    def __init__(self, tiers: Around, directory: Directory, page_bytes: int, beside: int) -> None:
        self._tiers, self._directory = tiers, directory
        self._page_bytes, self._beside = page_bytes, beside

    def fetch(self, wanted: list[Wanted]) -> list[Ticket]:
        """Begins to read from the lower tiers."""
        uses, vault = self._tiers.uses, self._tiers.vault
        assert vault is not None, "only a vault has records"
        tickets: list[Ticket] = []
        try:
            for want in wanted:
                tickets.append(vault.fetch(want.record, want.slices))
                if tickets[-1].job is None:
                    uses.host += len(want.to_A)
                else:
                    uses.disk += len(want.to_A)
        except BaseException:
            for ticket in tickets:
                ticket.release()
            raise
        return tickets

    def land(
        self, wanted: list[Wanted], tickets: list[Ticket], target_PX: Tensor, fence: Any = None
    ) -> None:
        """Copies what was read to where it goes; whatever fails, nothing stays pinned."""
        try:
            self._tiers.engine.after(fence)
            for want, ticket in zip(wanted, tickets, strict=True):
                with ticket:  # the next ones may wait for its space
                    slices_NX, begun = ticket.wait(), perf_counter()
                    self._copy(want, slices_NX, target_PX)
                self._tiers.uses.copied(len(want.to_A) * self._page_bytes, begun)
        finally:
            for ticket in tickets:
                ticket.release()

    def _copy(self, want: Wanted, slices_NX: Tensor, target_PX: Tensor) -> None:
        """Copies the pages of slices to where they go."""
        in_slice = slices_NX.shape[1] // (self._page_bytes + self._beside)
        whole_NX = slices_NX[:, : in_slice * self._page_bytes]
        whole_NX = whole_NX.as_strided(
            (len(whole_NX), in_slice, self._page_bytes), (whole_NX.stride(0), self._page_bytes, 1)
        )
        first, count = int(want.to_A[0]), len(want.to_A)
        everything = count == len(slices_NX) * in_slice and bool((want.place_A.diff() == 1).all())
        if everything and bool((want.to_A.diff() == 1).all()):  # one copy, as it mostly is
            place_NX = target_PX[first : first + count].view(whole_NX.shape)
            self._tiers.engine.copy(place_NX, whole_NX).wait()
            return
        page_AX = whole_NX[want.place_A // in_slice, want.place_A % in_slice]
        target_PX[want.to_A.to(target_PX.device)] = page_AX.to(target_PX.device)

    def wanted(self, id_A: Tensor, to_A: Tensor) -> list[Wanted]:
        """The slices of records that hold these pages, by record, and where their pages go."""
        own = self._directory
        record_A, place_A = own.record_P[id_A], own.place_P[id_A]
        numbers, counts = torch.unique_consecutive(record_A, return_counts=True)
        wanted, start = [], 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            record = own.records[number]
            mine = slice(start, start + count)
            start += count
            in_slice = record.slice_bytes // (self._page_bytes + self._beside)
            slices, which_A = torch.unique(place_A[mine] // in_slice, return_inverse=True)
            among_A = which_A * in_slice + place_A[mine] % in_slice
            wanted.append(Wanted(record, slices.tolist(), among_A, to_A[mine]))
        return wanted


class Arriving:
    """Pages on their way, and the numbers that they will have.

    lost: whether others were sent to the same places before these were used.
    """

    def __init__(self, at_A: Tensor, copied: Future[None] | None, tiers: Around) -> None:
        self._at_A, self._copied, self._tiers = at_A, copied, tiers
        self.lost = False

    def wait(self) -> Tensor:
        """The numbers, once the pages are there. Raises TierError."""
        if self._copied is not None:
            with self._tiers.stalls:
                self._copied.result()
        return self._at_A
