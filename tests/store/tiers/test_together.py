"""Slices of several records are one read: few calls, the same bytes, and nothing lost on errors."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import tiers
import torch
from torch import Tensor

from kvpress import TierError, TierIntegrityError
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.ticket import Ticket, Wanted, groups
from kvpress.store.tiers.vault import Vault

WIDTH, HEADS = UNIT, 12


class Counted(Syscalls):
    """Counts reads. error: what they give instead of bytes."""

    reads, error = 0, 0

    def read(self, fd: int, reads_AX: Tensor, arena_X: Tensor, threads: int) -> Tensor:
        self.reads += 1
        if self.error:
            return torch.full((len(reads_AX),), self.error)
        return super().read(fd, reads_AX, arena_X, threads)


def made(
    folder: Path, count: int, calls: Syscalls | None = None
) -> tuple[Vault, list[Record], list[Tensor]]:
    store = tiers.vault(folder, 256, in_flight_bytes=2**20, calls=calls)
    sent = [tiers.slices(HEADS, WIDTH) for _ in range(count)]
    return store, [store.put(x, tiers.owner(HEADS, first=i)) for i, x in enumerate(sent)], sent


def wanted_of(records: list[Record], keep: bool = False) -> list[Wanted]:
    return [Wanted(record, [i % 5, 7], keep) for i, record in enumerate(records)]


def found(store: Vault, ticket: Ticket) -> Tensor:
    begins = ticket.begins()
    return torch.stack([store.arena_X[begin : begin + WIDTH] for begin in begins])


def test_few_calls_read_many_records(tmp_path: Path) -> None:
    calls = Counted()
    store, records, sent = made(tmp_path, 8, calls)
    tickets = store.fetch_all(wanted_of(records))
    given = torch.cat([found(store, ticket) for ticket in tickets])
    assert len(tickets) == store.workers
    assert calls.reads == len(tickets)
    assert torch.equal(given, torch.cat([x[[i % 5, 7]] for i, x in enumerate(sent)]))
    assert [own.record for ticket in tickets for own in ticket.wanted] == records
    for ticket in tickets:
        ticket.release()
    assert store.bytes_in_flight == 0 and not any(record.pins for record in records)
    store.check_integrity()
    store.close()


def test_each_record_is_kept_as_was_asked_for_it(tmp_path: Path) -> None:
    store, records, _ = made(tmp_path, 4)
    wanted = [own._replace(keep=i % 2 == 0) for i, own in enumerate(wanted_of(records))]
    for ticket in store.fetch_all(wanted):
        ticket.begins()
        ticket.release()
    assert [sorted(record.kept) for record in records] == [[0, 7], [], [2, 7], []]
    assert store.bytes_in_flight == 0
    store.check_integrity()
    store.close()


def test_a_record_of_the_host_needs_no_read(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 64, host=64 * UNIT)
    sent = [tiers.slices(2, WIDTH) for _ in range(3)]
    records = [store.put(x, tiers.owner(2, first=i)) for i, x in enumerate(sent)]
    store.demote(records[1])
    tickets = store.fetch_all([Wanted(record, [1]) for record in records])
    given = torch.cat([found(store, ticket) for ticket in tickets])
    assert torch.equal(given, torch.stack([x[1] for x in sent]))
    assert store.counters.hits == 2
    for ticket in tickets:
        ticket.release()
    store.close()


def test_what_cannot_be_asked_for_leaves_nothing(tmp_path: Path) -> None:
    store, records, _ = made(tmp_path, 4)
    with pytest.raises(TierError, match="allowed are 0 to n - 1"):
        store.fetch_all([*wanted_of(records), Wanted(records[0], [HEADS])])
    assert store._jobs.wait(lambda: not store.bytes_in_flight, 5)
    assert not any(record.pins for record in records)
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("fault", ["damaged", "failed"])
def test_one_that_cannot_be_read_is_an_error_of_all_that_are_read_with_it(
    tmp_path: Path, fault: str
) -> None:
    calls = Counted()
    store, records, _ = made(tmp_path, 4, calls)
    if fault == "damaged":
        at = records[2].disk.place + records[2].begin(7)
        calls.pwritev(store._parts.disk.fd, [b"\xff" * 100], at)
    else:
        calls.error = errno.EIO
    error = TierIntegrityError if fault == "damaged" else TierError
    (ticket,) = [
        x for x in store.fetch_all(wanted_of(records, keep=True)) if records[2] in _records(x)
    ]
    with pytest.raises(error):
        ticket.begins()
    assert store._jobs.wait(lambda: not any(record.pins for record in records[2:]), 5)
    assert not records[2].kept
    store.check_integrity()
    store.close()


def _records(ticket: Ticket) -> list[Record]:
    return [own.record for own in ticket.wanted]


def test_reads_wait_for_space_for_all_of_them_and_lose_none(tmp_path: Path) -> None:
    store, records, sent = made(tmp_path, 4)
    size = store._parts.bounce.size
    places = store._parts.take_places([size // 2, size // 4])
    assert len(places) == 2
    assert store._parts.take_places([size // 8, size // 4]) == []  # and the first is given back
    tickets = store.fetch_all(wanted_of(records))
    for place in places:
        store._parts.give_bounce(place)
    given = torch.cat([found(store, ticket) for ticket in tickets])
    assert torch.equal(given, torch.cat([x[[i % 5, 7]] for i, x in enumerate(sent)]))
    for ticket in tickets:
        ticket.release()
    assert store.bytes_in_flight == 0
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("calls", [1, 2, 3, 50])
def test_groups_hold_everything_once_and_are_small(tmp_path: Path, calls: int) -> None:
    store, records, _ = made(tmp_path, 9)
    wanted = wanted_of(records)
    most = 3 * wanted[0].most_bytes
    found = list(groups(wanted, calls, most))
    assert [own for group in found for own in group] == wanted
    assert all(sum(own.most_bytes for own in group) <= most for group in found)
    assert len(found) == max(3, min(calls, 9))
    assert all(len(group) == 1 for group in groups(wanted, 1, 0))
    store.close()
