"""10,000 times a disk gives other bytes than were written: all are found, none are served."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiers
import torch
from torch import Tensor

from kvpress import TierIntegrityError
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.vault import Vault

HEADS, WIDTH = 8, 3000
CASES = 1000  # of each kind


class Stored:
    """Records on a disk, and their file, to be written to behind the vault's back."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.random = tiers.Faulty(), random.Random(0)
        self.vault = self.made(folder / "own", self.calls)
        self.records = [self.put(self.vault, i) for i in range(12)]
        other_calls = tiers.Faulty()
        other = self.made(folder / "other", other_calls)
        records = [self.put(other, i) for i in range(12)]  # the same slices and owners
        self.foreign = [os.pread(other_calls.files[0], r.bytes, r.disk.place) for r in records]
        other.close()
        self.stale = [self.image(record) for record in self.records[:4]]
        for i in range(4):
            self.vault.free(self.records[i])
        self.records[:4] = [self.put(self.vault, i) for i in range(4)]

    @staticmethod
    def made(folder: Path, calls: tiers.Faulty) -> Vault:
        folder.mkdir()
        return tiers.vault(folder, 128, in_flight_bytes=1 << 18, calls=calls)

    @staticmethod
    def put(store: Vault, seed: int) -> Record:
        return store.put(Stored.sent(seed), tiers.owner(HEADS, first=seed))

    @staticmethod
    def sent(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(256, (HEADS, WIDTH), dtype=torch.uint8, generator=draw)

    def image(self, record: Record) -> bytes:
        return os.pread(self.calls.files[0], record.bytes, record.disk.place)

    @contextmanager
    def damaged(self, *damages: tuple[Record, int, bytes]) -> Iterator[None]:
        """Other bytes at an offset of a record, as long as the context lasts."""
        before = [(record, self.image(record)) for record, *_ in damages]
        for record, at, data in damages:
            os.pwrite(self.calls.files[0], data, record.disk.place + at)
        assert all(self.image(record) != image for record, image in before)
        yield
        for record, image in before:
            os.pwrite(self.calls.files[0], image, record.disk.place)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    with tiers.memory_folder(tmp_path_factory.mktemp("disk")) as folder:
        made = Stored(folder)
        yield made
        made.vault.check_integrity()
        assert made.vault.bytes_in_flight == 0
        made.vault.close()


def flips(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """One bit, or several, anywhere."""
    found = []
    for at in stored.random.sample(range(record.bytes), stored.random.choice([1, 1, 2, 9])):
        byte = stored.image(record)[at] ^ 1 << stored.random.randrange(8)
        found.append((record, at, bytes([byte])))
    return found


def torn(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """A sector that was not written: it is empty, or as it was before, or anything."""
    size = stored.random.choice([512, 4096])
    at = stored.random.randrange(record.bytes // size) * size
    before = stored.stale[0][at : at + size]
    return [
        (record, at, stored.random.choice([bytes(size), before, stored.random.randbytes(size)]))
    ]


def old(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """The record that was in this place before: the same owner and even the same slices."""
    seed = stored.random.randrange(4)
    return [(stored.records[seed], 0, stored.stale[seed])]


def of_another(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """The record of the same number, owner and slices of another store."""
    return [(record, 0, stored.foreign[stored.records.index(record)])]


def swapped(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """Two records in each other's places."""
    other = stored.random.choice([r for r in stored.records if r is not record])
    return [(record, 0, stored.image(other)), (other, 0, stored.image(record))]


def heads(stored: Stored, record: Record) -> list[tuple[Record, int, bytes]]:
    """Slices of two heads in each other's places: of one record, or of two."""
    a, b = stored.random.sample(range(HEADS), 2)
    other = stored.random.choice([record, *stored.records])
    first, second = record.begin(a), other.begin(b)
    one, two = stored.image(record), stored.image(other)
    return [
        (record, first, two[second : second + WIDTH]),
        (other, second, one[first : first + WIDTH]),
    ]


KINDS = (flips, torn, old, of_another, swapped, heads)


def attempt(stored: Stored, record: Record, wanted: object = None) -> str:
    try:
        tiers.read(stored.vault, record, wanted)
        return "served"
    except TierIntegrityError as error:
        assert f"record {record.number} (generation {record.generation}" in str(error)
        return "found"


def all_are_found(stored: Stored, found: Counter[str], before: int) -> None:
    assert found == {"found": CASES}, found
    assert stored.vault.counters.integrity_failures - before == CASES
    for i, record in enumerate(stored.records):
        assert torch.equal(tiers.read(stored.vault, record), stored.sent(i))
    stored.vault.check_integrity()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_record_that_is_another_is_never_served(stored: Stored, kind: Any) -> None:
    found, before = Counter(), stored.vault.counters.integrity_failures
    while found.total() < CASES:
        damages = kind(stored, stored.random.choice(stored.records))
        if any(stored.image(r)[at : at + len(data)] == data for r, at, data in damages):
            continue  # zeros, where there were zeros
        with stored.damaged(*damages):
            found[attempt(stored, damages[0][0])] += 1
    all_are_found(stored, found, before)


@pytest.mark.parametrize("kind", ["flips", "swaps", "sectors"])
def test_a_slice_that_is_another_is_never_served(stored: Stored, kind: str) -> None:
    """Where few slices are read: damage to them is found, damage to others does no harm."""
    found, before, draw = Counter(), stored.vault.counters.integrity_failures, stored.random
    for _ in range(CASES):
        record = draw.choice(stored.records)
        wanted = draw.sample(range(HEADS), draw.randint(1, 3))
        at = record.begin(wanted[0]) + draw.randrange(WIDTH)
        damages = [(record, at, bytes([stored.image(record)[at] ^ 1 << draw.randrange(8)]))]
        if kind == "sectors":
            damages = [(record, at // 512 * 512, draw.randbytes(512))]
        if kind == "swaps":
            other, head = draw.choice(stored.records), draw.randrange(1, HEADS)
            begin = other.begin((wanted[0] + head) % HEADS)
            damages = [(record, record.begin(wanted[0]), stored.image(other)[begin:][:WIDTH])]
        with stored.damaged(*damages):
            found[attempt(stored, record, wanted)] += 1
            rest = [i for i in range(HEADS) if abs(i - wanted[0]) > 1][:2]
            whole = stored.sent(stored.records.index(record))
            assert torch.equal(tiers.read(stored.vault, record, rest), whole[rest])
    all_are_found(stored, found, before)


def test_a_file_that_was_cut_off_is_never_served(stored: Stored) -> None:
    found, before, draw = Counter(), stored.vault.counters.integrity_failures, stored.random
    fd = stored.calls.files[0]
    size = os.fstat(fd).st_size
    for _ in range(CASES):
        record = draw.choice(stored.records)
        last = record.begin(HEADS) - 64  # behind the slices are zeros, as a cut leaves them
        at = record.disk.place + draw.choice([draw.randrange(last), 4096, 0])
        rest = os.pread(fd, size - at, at)
        os.ftruncate(fd, at)
        if draw.random() < 0.5:
            os.ftruncate(fd, size)  # zeros then, as after a crash of the machine
        found[attempt(stored, record)] += 1
        os.ftruncate(fd, size)
        os.pwrite(fd, rest, at)
    all_are_found(stored, found, before)


SAID = {
    flips: r"damaged: its own checksum|record \d+ \(generation|no header",
    old: r"the header is that of record (\d+) \(generation 1, .*\) of this store",
    of_another: r"of the store [0-9a-f]{32}, not [0-9a-f]{32}",
    swapped: r"the header is that of record \d+",
}


@pytest.mark.parametrize("kind", SAID, ids=lambda kind: kind.__name__)
def test_the_error_says_what_is_there_instead(stored: Stored, kind: Any) -> None:
    damages = kind(stored, stored.records[5])
    with stored.damaged(*damages), pytest.raises(TierIntegrityError, match=SAID[kind]):
        tiers.read(stored.vault, damages[0][0])


def test_what_was_wrong_once_is_read_again(tmp_path: Path) -> None:
    def wrong(count: int, real: Any, fd: int, buffers: Any, offset: int) -> int:
        done = real(fd, buffers, offset)
        if count in bad:
            buffers[0][0] ^= 1
        return done

    bad: set[int] = set()
    for options in ({}, {"open": tiers.no_direct}):
        calls = tiers.Faulty(preadv=wrong, **options)
        store = tiers.vault(tmp_path, calls=calls)
        record = store.put(sent := tiers.slices(), tiers.owner())
        bad.add(calls.counts["preadv"] + 1)
        forgotten = calls.counts["forget"]
        assert torch.equal(tiers.read(store, record), sent)
        assert calls.counts["forget"] > forgotten
        assert (store.counters.rereads, store.counters.integrity_failures) == (1, 0)
        bad |= set(range(1000))
        with pytest.raises(TierIntegrityError):
            tiers.read(store, record)
        assert (store.counters.rereads, store.counters.integrity_failures) == (2, 1)
        assert store.counters.from_disk.count == 1 and store.bytes_in_flight == 0
        bad.clear()
        store.close()


def test_a_copy_that_was_damaged_on_the_host_is_found_when_it_is_read_back(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, host=16 * 8192)
    record = store.put(tiers.slices(), tiers.owner())
    with store.fetch(record) as ticket:
        ticket.wait()[1, 7] ^= 1
    store.demote(record)
    with pytest.raises(TierIntegrityError, match="its checksum is wrong"):
        tiers.read(store, record)
    with pytest.raises(TierIntegrityError):
        store.promote(record)
    store.check_integrity()
    assert store.bytes_host == store.bytes_in_flight == 0 and record.pins == 0
    store.close()
