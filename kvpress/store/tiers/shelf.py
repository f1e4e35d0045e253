"""Pages of one size on one device, wherever their bytes are, and reading them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvpress.host import lasting
from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.arrivals import Around, Arrivals, Arriving, Tenant
from kvpress.store.tiers.directory import NOWHERE, Directory
from kvpress.store.tiers.early import Early
from kvpress.store.tiers.idle import Idle
from kvpress.store.tiers.record import Owner
from kvpress.store.tiers.vault import Vault

Half: TypeAlias = Callable[[], Tensor]  # the places of a half of the staging
_TOGETHER = 64  # records that are asked for before the first one is copied
_AT_ONCE = 4  # records that are read while others are copied, where pages are read one after all


class Shelf:
    """Pages of `page_bytes` bytes on the device of an arena, by numbers that stay theirs.

    beside: bytes that a slice of a record has for each page besides.
    """

    def __init__(self, tiers: Around, arena: Arena, page_bytes: int, beside: int) -> None:
        self.tiers, self.arena = tiers, arena
        self.page_bytes, self.beside = page_bytes, beside
        self.directory = Directory()
        self.staging = arena.staging(page_bytes)
        self.idle = Idle(self.directory)
        self._arrivals = Arrivals(tiers, self.directory, page_bytes, beside)
        self.early = Early(tiers, arena, self.directory, self._arrivals, page_bytes)
        self._positions: dict[int, Tensor] = {}  # by slots of a page: formats may have equal bytes

    @property
    def pages(self) -> Tensor:
        """The arena as a pool of pages of this size, as operators read them."""
        return self.arena.pages(self.page_bytes)

    @lasting
    def positions(self, slots: int) -> Tensor:
        """A number for each slot of each page of the pool: int32 `[P, S]`, to be written to."""
        if slots not in self._positions:
            shape, device = (len(self.pages), slots), self.arena.device
            self._positions[slots] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._positions[slots]

    @property
    def nbytes(self) -> int:
        """Bytes on the device besides the arena."""
        return sum(position_PS.nbytes for position_PS in self._positions.values())

    def __deepcopy__(self, memo: object) -> Shelf:
        return self  # pages never change: a copy of rows has the same

    # Pages arrive, move and end

    def put(self, id_A: Tensor, page_AX: Tensor, tenant: Tenant | None) -> None:
        """Puts pages on the device. Raises TierError where there is no room for all of them."""
        self.tiers.make_room(page_AX.numel(), self.arena, tenant)
        done = self.put_some(id_A, page_AX)
        while done < len(id_A):
            # What is free may lie where no page of this size can begin: more must go then.
            rest_AX, free = page_AX[done:], self.arena.free
            self.tiers.make_room(free + rest_AX.numel(), self.arena, tenant)
            more = self.put_some(id_A[done:], rest_AX)
            if not more and self.arena.free <= free:
                raise self.tiers.full(rest_AX.numel())
            done += more

    def put_some(self, id_A: Tensor, page_AX: Tensor) -> int:
        """Puts as many of some pages on the device as there is room for: the first ones."""
        at_A = self.arena.take(len(id_A), self.page_bytes)
        self.pages[at_A.to(self.arena.device)] = page_AX[: len(at_A)]
        self.idle.came()
        self.directory.arrive(id_A[: len(at_A)], at_A)
        return len(at_A)

    def tier_bytes(self, id_A: Tensor) -> dict[str, int]:
        """Bytes of some pages in each tier."""
        own = self.directory
        away_A = own.at_P[id_A] == NOWHERE
        records = torch.unique(own.record_P[id_A[away_A]], return_counts=True)
        below = zip(*(x.tolist() for x in records), strict=True)
        on_host = sum(pages for number, pages in below if own.records[number].host.sealed)
        counts = {"device": int((~away_A).sum()), "host": on_host}
        counts["disk"] = len(id_A) - sum(counts.values())
        return {tier: count * self.page_bytes for tier, count in counts.items()}

    def put_below(
        self, id_NP: Tensor, slices_NX: Tensor, owner: Owner, place_A: Tensor | None = None
    ) -> None:
        """Makes a record of slices that hold these pages, at some places. Raises TierError."""
        if self.tiers.vault is None:
            raise self.tiers.full(slices_NX.numel())
        self.directory.seal(id_NP.flatten(), self.vault.put(slices_NX, owner), place_A)

    def leave(self, id_A: Tensor) -> None:
        """Frees the places of pages on the device; each of them has a record."""
        assert bool((self.directory.record_P[id_A] != NOWHERE).all()), "no other copy is there"
        self.arena.give(self.directory.depart(id_A), self.page_bytes)

    def thin(self, least: int) -> int:
        """Frees at least so many bytes, or what there is, of pages that no last step chose.

        Those that have a copy below, the one chosen longest ago first. Returns how many bytes.
        """
        left = most = -(-least // self.page_bytes)
        while left > 0 and (some_A := self.idle.next(left)) is not None:
            self.leave(some_A)
            left -= len(some_A)
        return (most - left) * self.page_bytes

    def collect(self, in_use: Sequence[Tensor]) -> None:
        """Frees the pages that are not among these."""
        self.early.forget()
        gone_P = self.directory.known()
        for id_A in in_use:
            gone_P[id_A] = False
        at_A, records = self.directory.forget(gone_P.nonzero().flatten())
        self.arena.give(at_A, self.page_bytes)
        for record in records:
            self.vault.free(record)

    # Pages are read

    def bring(self, id_A: Tensor, most: int, half: Half | None) -> Tensor:
        """Copies pages to the device, where so many of them stay if they find room: the first ones.

        They keep their records, so that they can leave again at once. half: gives places of the
        staging for the others, if all of them find room there. Returns where those are that were
        copied. Raises TierError.
        """
        at_A = self.arena.take(min(most, len(id_A)), self.page_bytes)
        stay, to_A = len(at_A), at_A
        if half is not None and stay < len(id_A) <= stay + self.at_once:
            half_A = half()  # only now: whoever had it loses what is there
            if len(id_A) <= stay + len(half_A):
                to_A = torch.cat([at_A, half_A[: len(id_A) - stay]])
        try:
            with self.tiers.stalls:
                self._arrivals.read(id_A[: len(to_A)], to_A, self.pages, _TOGETHER)
        except BaseException:
            self.arena.give(at_A, self.page_bytes)
            raise
        self.directory.arrive(id_A[:stay], at_A)
        self.tiers.uses.brought += len(to_A)
        return to_A

    def read(self, id_A: Tensor) -> Tensor:
        """A copy of pages on the device, `[A, page_bytes]`. Raises TierError."""
        out_AX = self.pages.new_empty(len(id_A), self.page_bytes)
        at_A = self.directory.at_P[id_A]
        here_A = at_A != NOWHERE
        self.tiers.uses.device += int(here_A.sum())
        device = self.arena.device
        out_AX[here_A.to(device)] = self.pages[at_A[here_A].to(device)]
        away_A = (~here_A).nonzero().flatten()
        if len(away_A):
            away_A = away_A[self.directory.by_record(id_A[away_A])]
            self._arrivals.read(id_A[away_A], away_A, out_AX, _AT_ONCE)
        return out_AX

    def stream(self, batches: Sequence[Tensor], first: Arriving | None = None) -> Iterator[Tensor]:
        """For each of some lists of pages, the numbers under which operators find them.

        They hold until the next ones are asked for. While one list is used the next is read. A list
        has at most `at_once` pages. first: what `begin` gave for the first list, if it was called.
        Raises TierError.
        """
        following = first if first is not None and not first.lost else None
        if following is not None:  # others may have taken the other half since
            self.arena.keep(following)
        elif batches:
            following = self.begin(batches[0])
        for later in [*batches[1:], None]:
            assert following is not None, "there is one for each list"
            at_A = following.wait()
            following = None if later is None else self.begin(later)
            yield at_A

    def begin(self, id_A: Tensor) -> Arriving:
        """Starts to read what of these pages is not on the device.

        Copies end in the order in which they begin, so that what is copied later to the same half
        of the staging does not mix with what is on its way there.
        """
        at_A = self.directory.at_P[id_A]
        away_A = (at_A == NOWHERE).nonzero().flatten()
        self.tiers.uses.device += len(at_A) - len(away_A)
        if not len(away_A):
            return Arriving(at_A, None, self.tiers)
        away_A = away_A[self.directory.by_record(id_A[away_A])]  # records are copied as a whole
        half = self.arena.turn()
        at_A[away_A] = self.staging[half][: len(away_A)]
        copied = self._arrivals.begin(id_A[away_A], at_A[away_A], self.pages)
        arriving = Arriving(at_A, copied, self.tiers)
        self.arena.hold(half, arriving)
        return arriving

    @property
    def at_once(self) -> int:
        """Pages that can be on their way together."""
        return min(len(half) for half in self.staging)

    @property
    def vault(self) -> Vault:
        """The host and the disk tier, which are there where a page has a record."""
        assert self.tiers.vault is not None, "only a vault has records"
        return self.tiers.vault
