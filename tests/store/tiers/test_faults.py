"""A disk that fails, is slow or hangs: exact bytes or a typed error, no hang, and no place lost."""

from __future__ import annotations

import errno
import faulthandler
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiers
import torch

from kvpress import TierError, TierTimeoutError
from kvpress.store.tiers.vault import Vault

RECORD = 2 * 4096


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def scenario(store: Vault) -> tuple[int, int]:
    """Puts, moves and reads records: how many calls gave exact bytes, and how many an error."""
    exact, errors, held = 0, 0, []
    for step in range(8):
        sent = tiers.slices()
        try:
            held.append((store.put(sent, tiers.owner(first=step)), sent))
        except TierError:
            errors += 1
        store.check_integrity()
    for step, (record, sent) in enumerate(held):
        for act in (store.promote, store.demote)[: step % 3] if store.capacity_host else ():
            try:
                act(record)
            except TierError:
                errors += 1
            store.check_integrity()
        for wanted in (range(2), [1]):
            try:
                assert torch.equal(tiers.read(store, record, wanted), sent[list(wanted)])
                exact += 1
            except TierError:
                errors += 1
    return exact, errors


def released(store: Vault) -> None:
    """Nothing is held when everything was freed, once reads have ended."""
    for record in list(store._placement.records):
        if not record.freed:
            store.free(record)
    until = time.monotonic() + 20
    while store.bytes_host + store.bytes_disk and time.monotonic() < until:
        time.sleep(0.001)
    store.check_integrity()
    assert store.bytes_host == store.bytes_disk == 0


def nothing(count: int, real: Any, *arguments: Any) -> int:
    return 0


KINDS = {
    "EIO": tiers.fails(errno.EIO),
    "ENOSPC": tiers.fails(errno.ENOSPC),
    "EINTR": tiers.fails(errno.EINTR),
    "EINVAL": tiers.fails(errno.EINVAL),
    "short": tiers.short(1000),
    "sector": tiers.short(512),
    "nothing": nothing,
}


def at(number: int, fault: Any, last: int) -> Any:
    """A fault of one call, or of this and all that follow."""

    def one(count: int, real: Any, *arguments: Any) -> Any:
        return fault(1, real, *arguments) if number <= count <= last else real(*arguments)

    return one


@pytest.mark.parametrize("host", [0, 4 * RECORD + 8 * RECORD], ids=["disk only", "host"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_fault_at_any_call(name: str, kind: str, host: int, tmp_path: Path) -> None:
    with tiers.memory_folder(tmp_path) as folder:
        calls = tiers.Faulty()
        store = tiers.vault(folder, 12, host, calls=calls)
        probes = calls.counts[name]
        assert scenario(store)[1] == 0
        total = calls.counts[name]
        store.close()
        seen = [0, 0]
        for number in range(probes + 1, total + 1):
            for last in (number, 10**9) if kind != "EINTR" else (number,):
                fault = at(number, KINDS[kind], last)
                store = tiers.vault(folder, 12, host, calls=tiers.Faulty(**{name: fault}))
                seen = [a + b for a, b in zip(seen, scenario(store), strict=True)]
                counters = store.counters
                released(store)
                store.close()
                assert tiers.left(folder) == []
        assert (seen[1] == 0) == (kind in ("EINTR", "short", "sector", "EINVAL")) or seen[1] > 0
        print(name, kind, f"{total - probes} calls, exact {seen[0]}, errors {seen[1]}", counters)


class Gate:
    """Reads or writes that hang until the gate is opened, from a call on."""

    def __init__(self, first: int = 1) -> None:
        self.opened, self.hanging, self.first = threading.Event(), threading.Semaphore(0), first
        self.armed = False

    def __call__(self, count: int, real: Any, fd: int, buffers: Any, offset: int) -> Any:
        if self.armed and not self.opened.is_set():
            self.hanging.release()
            assert self.opened.wait(30)
        return real(fd, buffers, offset)


def test_the_space_of_a_read_that_hangs_is_nobodys_until_it_ends(tmp_path: Path) -> None:
    gate = Gate()
    store = tiers.vault(tmp_path, calls=tiers.Faulty(preadv=gate), deadline_s=0.05)
    sent = [tiers.slices() for _ in range(8)]
    records = [store.put(x, tiers.owner()) for x in sent]
    gate.armed = True
    ticket = store.fetch(records[0])
    assert gate.hanging.acquire(timeout=10)
    gate.armed = False  # the others do not hang
    with pytest.raises(TierTimeoutError, match=r"not read within 0\.05 s"):
        ticket.wait()
    assert store.bytes_in_flight == RECORD and records[0].pins == 1
    store.free(records[0])
    assert store.bytes_disk == 8 * RECORD  # its place is not given to others either
    store.put(tiers.slices(), tiers.owner())
    tickets = [store.fetch(record) for record in records[1:]]
    found = [t.wait() for t in tickets]
    assert store.bytes_in_flight == 8 * RECORD
    gate.opened.set()  # the late read writes now
    wait_until(lambda: store.bytes_in_flight == 7 * RECORD)
    assert all(torch.equal(*pair) for pair in zip(found, sent[1:], strict=True))
    wait_until(lambda: store.bytes_disk == 8 * RECORD)
    for t in tickets:
        t.release()
    with pytest.raises(TierError, match="has ended"):
        ticket.wait()
    assert (store.counters.timeouts, store.counters.failures) == (1, 1)
    assert store.bytes_in_flight == 0
    released(store)
    store.close()


def wait_until(so: Any) -> None:
    until = time.monotonic() + 20
    while not so():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_write_that_hangs_is_an_error_and_its_places_come_back(tmp_path: Path) -> None:
    gate = Gate()
    calls = tiers.Faulty(pwritev=gate)
    for host in (0, 4 * RECORD + 8 * RECORD):
        gate.opened.clear()
        gate.armed = False
        store = tiers.vault(tmp_path, 16, host, calls=calls, deadline_s=0.05)
        held = [(store.put(x := tiers.slices(), tiers.owner()), x) for _ in range(6)]
        gate.armed = True
        for _ in range(2):
            with pytest.raises(TierTimeoutError, match=r"not written within 0\.05 s"):
                store.put(tiers.slices(), tiers.owner())
        store.check_integrity()
        gate.opened.set()
        for record, slices_AX in held:
            assert torch.equal(tiers.read(store, record), slices_AX)
        wait_until(lambda s=store: s.bytes_in_flight == 0)
        released(store)
        store.close()


def test_closing_while_a_read_hangs_does_not_wait_for_ever(tmp_path: Path) -> None:
    gate, before = Gate(), threading.active_count()
    store = tiers.vault(tmp_path, calls=tiers.Faulty(preadv=gate), deadline_s=0.05)
    record = store.put(tiers.slices(), tiers.owner())
    gate.armed = True
    tickets = [store.fetch(record) for _ in range(5)]
    assert gate.hanging.acquire(timeout=10)
    store.close()
    for ticket in tickets:
        with pytest.raises(TierError, match=r"dropped before it began|not read within"):
            ticket.wait()
    gate.opened.set()
    wait_until(lambda: threading.active_count() == before)


def test_a_read_that_has_not_begun_is_dropped(tmp_path: Path) -> None:
    gate, before = Gate(), 0
    calls = tiers.Faulty(preadv=gate)
    store = tiers.vault(tmp_path, calls=calls, workers=1)
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(4)]
    gate.armed = True
    first = store.fetch(records[0])
    assert gate.hanging.acquire(timeout=10)
    tickets = [first, *(store.fetch(record) for record in records[1:])]
    before = calls.counts["preadv"]
    for ticket in tickets:
        ticket.cancel()
    assert [r.pins for r in records] == [1, 0, 0, 0] and store.bytes_in_flight == RECORD
    gate.opened.set()
    wait_until(lambda: store.bytes_in_flight == 0)
    assert calls.counts["preadv"] == before and not any(r.pins for r in records)
    assert store.counters.failures == 0
    with pytest.raises(TierError, match="has ended"):
        tickets[3].wait()
    store.check_integrity()
    store.close()


def test_what_is_urgent_is_read_first_and_reads_before_writes(tmp_path: Path) -> None:
    gate, order = Gate(), []

    def noted(count: int, real: Any, fd: int, buffers: Any, offset: int) -> Any:
        gate(count, real, fd, buffers, offset)
        order.append(offset)
        return real(fd, buffers, offset)

    store = tiers.vault(
        tmp_path, host=12 * RECORD, calls=tiers.Faulty(preadv=noted, pwritev=noted), workers=1
    )
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(4)]
    for record in records:
        store.demote(record)
    late = store.put(tiers.slices(), tiers.owner())
    gate.armed = True
    first = store.fetch(records[0], priority=9)
    assert gate.hanging.acquire(timeout=10)
    writer = threading.Thread(target=store.demote, args=(late,))
    writer.start()
    wait_until(lambda: late.write is not None)
    tickets = [store.fetch(records[i], priority=p) for i, p in ((1, 5), (2, 1), (3, 5))]
    order.clear()
    gate.opened.set()
    for ticket in (first, *tickets):
        ticket.wait()
        ticket.release()
    writer.join()
    places = [r.disk.place for r in (records[0], records[2], records[1], records[3], late)]
    assert list(dict.fromkeys(order)) == places
    store.close()


def test_tickets_that_hold_all_space_are_an_error_not_a_hang(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, deadline_s=0.05)
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(9)]
    tickets = [store.fetch(record) for record in records]
    for ticket in tickets[:8]:
        ticket.wait()
    with pytest.raises(TierTimeoutError, match=r"not released hold .*\(65536 of 65536 bytes\)"):
        tickets[8].wait()
    with pytest.raises(TierTimeoutError, match="not released hold 65536 of 65536"):
        store.put(tiers.slices(), tiers.owner())
    for ticket in tickets:
        ticket.release()
    tiers.read(store, records[8])
    assert store.bytes_disk == 9 * RECORD and store.bytes_in_flight == 0
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("direct", [True, False])
def test_late_and_shuffled_reads_and_copies_never_change_bytes(
    tmp_path: Path, workers: int, direct: bool
) -> None:
    def slow(count: int, real: Any, *arguments: Any) -> Any:
        time.sleep(random.random() / 500)
        return real(*arguments)

    faults = {"preadv": slow, "pwritev": slow} | ({} if direct else {"open": tiers.no_direct})
    calls, draw = tiers.Faulty(**faults), random.Random(workers)
    room = {"host": 28 * RECORD, "in_flight_bytes": 14 * RECORD}
    store = tiers.vault(tmp_path, calls=calls, workers=workers, engine=tiers.LateCopies(), **room)
    sent = [tiers.slices() for _ in range(24)]
    records = [store.put(x, tiers.owner()) for x in sent]
    held, exact = [], 0
    for _ in range(300):
        i = draw.randrange(24)
        wanted = draw.choice([[0], [1], [0, 1], [1, 0]])
        held.append((store.fetch(records[i], wanted, draw.randrange(3)), sent[i][wanted]))
        if len(held) == 7:  # half of what may be in flight: holes of odd sizes do not matter
            draw.shuffle(held)
            ticket, slices_AX = held.pop()
            if draw.random() < 0.3:
                ticket.cancel()
                continue
            assert torch.equal(ticket.wait(), slices_AX)
            exact += 1
            ticket.release()
    assert exact > 150
    for ticket, slices_AX in held:
        assert torch.equal(ticket.wait(), slices_AX)
        ticket.release()
    wait_until(lambda: store.bytes_in_flight == 0)
    store.check_integrity()
    store.close()


def test_threads_that_use_one_vault_at_once(tmp_path: Path) -> None:
    store, failed = tiers.vault(tmp_path, 200, 16 * RECORD), []

    def work(seed: int) -> None:
        draw, held = random.Random(seed), []
        try:
            for _ in range(150):
                sent = torch.full((2, 1000), draw.randrange(256), dtype=torch.uint8)
                held.append((store.put(sent, tiers.owner(sequence=seed)), sent))
                record, slices_AX = draw.choice(held)
                with store.fetch(record, priority=draw.randrange(2)) as ticket:
                    assert torch.equal(ticket.wait(), slices_AX)
                if draw.random() < 0.2:
                    store.promote(record)
                if len(held) > 10:
                    store.free(held.pop(draw.randrange(10))[0])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    released(store)
    store.close()


def test_where_records_lie_depends_on_the_order_of_calls_only(tmp_path: Path) -> None:
    def slow(count: int, real: Any, *arguments: Any) -> Any:
        time.sleep(random.random() / 1000)
        return real(*arguments)

    seen = []
    for workers, fault in ((1, None), (2, slow), (4, slow)):
        draw = random.Random(0)
        faults = {"preadv": fault, "pwritev": fault} if fault else {}
        store = tiers.vault(
            tmp_path, 40, 16 * RECORD, calls=tiers.Faulty(**faults), workers=workers
        )
        held, states = [], []
        for step in range(120):
            sent = tiers.slices(2, draw.choice([100, 3000]))
            held.append(store.put(sent, tiers.owner()))
            tiers.read(store, draw.choice(held))
            if draw.random() < 0.3:
                draw.choice([store.promote, store.demote])(draw.choice(held))
            if len(held) > 20:
                store.free(held.pop(draw.randrange(20)))
            states += [(step, r.number, r.host.place, r.disk.place) for r in held]
        seen.append(states)
        store.close()
    assert seen[0] == seen[1] == seen[2]
