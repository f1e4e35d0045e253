"""What a vault promises when nothing fails."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import tiers
import torch

from kvpress import TierError
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.folder import DiskSpec
from kvpress.store.tiers.record import Owner, State

RECORD = 2 * UNIT


@pytest.mark.parametrize("host", [0, 16 * RECORD, 3 * RECORD + 16 * RECORD])
@pytest.mark.parametrize("heads, width", [(1, 1), (2, 1000), (3, UNIT), (5, 4099), (200, 64)])
def test_what_is_put_is_fetched(tmp_path: Path, host: int, heads: int, width: int) -> None:
    size = 32 * (heads * (width + 24) + 2 * UNIT)
    store = tiers.vault(tmp_path, 1000, host and max(host, size), in_flight_bytes=size)
    sent = [tiers.slices(heads, width) for _ in range(20)]
    records = [store.put(x, tiers.owner(heads, first=i)) for i, x in enumerate(sent)]
    for record, slices_AX in zip(records, sent, strict=True):
        assert torch.equal(tiers.read(store, record), slices_AX)
        for wanted in ([0], [heads - 1], list(range(0, heads, 2)), list(reversed(range(heads)))):
            assert torch.equal(tiers.read(store, record, wanted), slices_AX[wanted])
        assert len(record.digests) == record.slices == heads
    store.check_integrity()
    for record in records:
        store.free(record)
    store.check_integrity()
    assert store.bytes_host == store.bytes_disk == store.bytes_in_flight == 0
    store.close()
    assert tiers.left(tmp_path) == []


def test_only_the_ranges_of_few_slices_are_read(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 64, in_flight_bytes=64 * UNIT)
    record = store.put(sent := tiers.slices(16, UNIT), tiers.owner(16))
    before = store.counters.from_disk.bytes
    assert torch.equal(tiers.read(store, record, [3, 9]), sent[[3, 9]])
    assert store.counters.from_disk.bytes - before == 2 * UNIT
    assert torch.equal(tiers.read(store, record, range(12)), sent[:12])
    assert store.counters.from_disk.bytes - before == 2 * UNIT + record.bytes
    store.close()


def test_the_tensor_may_be_used_again_and_need_not_be_contiguous(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path)
    sent = tiers.slices(500, 6)
    record = store.put(turned := sent.T[:2], tiers.owner())
    wanted = turned.clone()
    sent.zero_()
    assert torch.equal(tiers.read(store, record), wanted)
    store.close()


def test_the_record_that_was_used_longest_ago_goes_to_the_disk(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 16, 8 * RECORD)  # four on the host, four to pass through
    first = [store.put(tiers.slices(), tiers.owner()) for _ in range(4)]
    assert all(r.host.state is State.SEALED and r.disk.state is State.ABSENT for r in first)
    tiers.read(store, first[0])
    held = store.fetch(first[1])
    store.put(tiers.slices(), tiers.owner())
    states = [(r.host.sealed, r.disk.sealed) for r in first]
    assert states == [(True, False), (True, False), (False, True), (True, False)]
    store.put(tiers.slices(), tiers.owner())
    store.put(tiers.slices(), tiers.owner())
    assert [r.host.sealed for r in first] == [False, True, False, False]  # read now: stays
    held.release()
    store.put(tiers.slices(), tiers.owner())
    assert not first[1].host.sealed
    assert (store.bytes_host, store.bytes_disk) == (4 * RECORD, 4 * RECORD)
    store.check_integrity()
    store.close()


def test_a_promoted_record_is_not_written_twice(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 16, 8 * RECORD)
    record = store.put(sent := tiers.slices(), tiers.owner())
    store.demote(record)
    assert (record.host.state, record.disk.state) == (State.ABSENT, State.SEALED)
    store.promote(record)
    assert record.host.sealed and record.disk.sealed
    store.demote(record)
    assert store.counters.to_disk.count == 1
    assert torch.equal(tiers.read(store, record), sent)
    store.close()


@pytest.mark.parametrize("heads, width", [(1, UNIT), (1, 1), (8, UNIT), (3, 5000)])
def test_what_is_promoted_is_all_there(tmp_path: Path, heads: int, width: int) -> None:
    """A slice may be half of its record: it was once taken for all of it."""
    store = tiers.vault(tmp_path, 64, 60 * RECORD, in_flight_bytes=30 * RECORD)
    record = store.put(sent := tiers.slices(heads, width), tiers.owner(heads))
    for _ in range(2):
        store.demote(record)
        store.promote(record)
        assert torch.equal(tiers.read(store, record), sent)
    store.close()


def test_copies_that_the_host_has_too_make_room_on_the_disk(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 2, 8 * RECORD)
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(3)]
    for record in records[:2]:
        store.demote(record)
    with pytest.raises(TierError, match=r"is full: 16384 of 16384 bytes are held, 8192 are needed"):
        store.demote(records[2])
    assert records[2].host.sealed
    store.promote(records[0])
    store.demote(records[2])
    assert records[0].disk.state is State.ABSENT and records[2].disk.sealed
    store.check_integrity()
    store.close()


def test_both_tiers_full_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 2, 8 * RECORD)
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(6)]
    for _ in range(3):
        with pytest.raises(TierError, match="Raise its size"):
            store.put(tiers.slices(), tiers.owner())
        store.check_integrity()
        assert (store.bytes_host, store.bytes_disk) == (4 * RECORD, 2 * RECORD)
    store.free(records[0])
    store.put(tiers.slices(), tiers.owner())
    store.close()


def test_a_full_host_without_a_disk_says_what_to_raise() -> None:
    store = tiers.vault(None, host=4 * RECORD)
    records = [store.put(tiers.slices(), tiers.owner()) for _ in range(4)]
    with pytest.raises(TierError, match=r"32768 of 32768 bytes are held.*give disk="):
        store.put(tiers.slices(), tiers.owner())
    with pytest.raises(TierError, match=r"does not fit .* 32768 bytes\. Raise"):
        store.put(tiers.slices(40, 1000), tiers.owner(40))
    with pytest.raises(TierError, match="disk="):
        store.demote(records[0])
    store.check_integrity()
    store.close()


def test_places_are_free_when_the_last_ticket_is_released(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, host=8 * RECORD)
    record, other = (store.put(tiers.slices(), tiers.owner()) for _ in range(2))
    store.demote(other)
    tickets = [store.fetch(r) for r in (record, record, other)]
    found = [ticket.wait() for ticket in tickets]
    kept = [x.clone() for x in found]
    assert (record.pins, other.pins) == (2, 1)
    with pytest.raises(TierError, match="Release its tickets"):
        store.demote(record)
    store.free(record)
    store.free(other)
    assert (store.bytes_host, store.bytes_disk) == (RECORD, RECORD)
    store.put(tiers.slices(), tiers.owner())
    assert all(torch.equal(*pair) for pair in zip(found, kept, strict=True))
    for ticket in tickets:
        ticket.release()
        ticket.release()
    assert (store.bytes_host, store.bytes_disk) == (RECORD, 0)
    for act in (store.free, store.fetch, store.demote, store.promote):
        with pytest.raises(TierError, match="no longer"):
            act(record)
    with pytest.raises(TierError, match="has ended"):
        tickets[0].wait()
    store.check_integrity()
    store.close()


def test_numbers_are_used_again_with_a_new_generation(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path)
    first, second = (store.put(tiers.slices(), tiers.owner()) for _ in range(2))
    store.free(first)
    third = store.put(tiers.slices(), tiers.owner())
    assert (first.number, first.generation) == (third.number, third.generation - 1)
    assert second.number != third.number and first is not third
    store.close()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    store, other = tiers.vault(tmp_path), tiers.vault(None, host=8 * RECORD)
    record = store.put(tiers.slices(), tiers.owner())
    wrong = [
        (tiers.slices(3), tiers.owner(2)),
        (tiers.slices().float(), tiers.owner()),
        (tiers.slices()[:, :0], tiers.owner()),
        (tiers.slices().flatten(), tiers.owner()),
    ]
    for slices_AX, owner in wrong:
        with pytest.raises(TierError, match="Allowed: uint8"):
            store.put(slices_AX, owner)
    for odd in (2**63, 1.5, None):
        with pytest.raises(TierError, match="whole numbers of 64 bits"):
            store.put(tiers.slices(), tiers.owner()._replace(sequence=odd))
    for wanted in ([], [2], [-1], [0, 7]):
        with pytest.raises(TierError, match="allowed are"):
            store.fetch(record, wanted)
    with pytest.raises(TierError, match="not, or no longer, in this vault"):
        other.fetch(record)
    with pytest.raises(TierError, match=r"needs 139264 bytes to pass.* at least 278528"):
        store.put(tiers.slices(64, 1000), tiers.owner(64))
    store.check_integrity()
    for vault in (store, other):
        vault.close()
        with pytest.raises(TierError, match="closed"):
            vault.put(tiers.slices(), tiers.owner())


@pytest.mark.parametrize("host, in_flight", [(1, 1 << 20), (0, 1), (7 * UNIT, 1 << 20), (-1, 1)])
def test_a_host_that_is_too_small_is_refused(tmp_path: Path, host: int, in_flight: int) -> None:
    with pytest.raises(TierError, match=f"too small. Allowed: at least {8 * UNIT}"):
        tiers.vault(tmp_path, host=host, in_flight_bytes=in_flight)
    assert tiers.left(tmp_path) == []


def test_memory_that_is_not_there_is_an_error() -> None:
    for size in (1 << 60, 1 << 80):
        with pytest.raises(TierError, match="cannot be had"):
            tiers.vault(None, host=size)


def test_no_thread_and_no_file_outlive_a_vault(tmp_path: Path) -> None:
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    store = tiers.vault(tmp_path, workers=4)
    record = store.put(tiers.slices(), tiers.owner())
    tiers.read(store, record)
    assert threading.active_count() == before[0] + 4
    store.close()
    store.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    store = tiers.vault(tmp_path)  # dropped, not closed
    tiers.read(store, store.put(tiers.slices(), tiers.owner()))
    del store
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert tiers.left(tmp_path) == []


def test_a_ticket_outlives_its_vault(tmp_path: Path) -> None:
    store = tiers.vault(None, host=8 * RECORD)
    record = store.put(sent := tiers.slices(), tiers.owner())
    found = store.fetch(record).wait()
    store.close()
    del store
    gc.collect()
    assert torch.equal(found, sent)


def test_it_works_under_inference_mode_and_outside(tmp_path: Path) -> None:
    with torch.inference_mode():
        store = tiers.vault(tmp_path, host=8 * RECORD)
        record = store.put(sent := tiers.slices(), tiers.owner())
    store.demote(record)
    other = store.put(tiers.slices(), tiers.owner())
    assert torch.equal(tiers.read(store, record), sent)
    with torch.inference_mode():
        store.promote(record)
        assert torch.equal(tiers.read(store, record), sent)
        store.free(other)
    store.close()


def test_memory_and_file_stay_as_large_as_they_are() -> None:
    with tiers.memory_folder(Path("/tmp")) as folder:
        calls = tiers.Faulty()
        store = tiers.vault(folder, 32, 16 * RECORD, calls=calls)
        slices_AX, owner = tiers.slices(), tiers.owner()
        held, sizes = [], set()
        for step in range(10_000):
            held.append(store.put(slices_AX, owner))
            if len(held) > 30:
                store.free(held.pop(step % 17))
            if step % 500 == 499:
                found = os.fstat(calls.files[0])
                sizes.add((found.st_size, found.st_blocks, resident() if step > 5000 else 0))
        least, most = (f(rss for *_, rss in sizes if rss) for f in (min, max))
        assert len({size[:2] for size in sizes}) == 1 and most - least < 2 << 20, sizes
        store.check_integrity()
        assert store.counters.to_disk.count > 1000
        store.close()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("text", ["20GiB", "20:x", "GiB:x", "1B:x", "20GiB:", "-1GiB:x", "2XB:x"])
def test_a_disk_that_cannot_be_read_says_what_can(text: str) -> None:
    with pytest.raises(TierError, match="Allowed: a size of at least 4096B with a unit"):
        DiskSpec.parse(text)


def test_a_disk_is_a_size_and_a_folder() -> None:
    assert DiskSpec.parse("1.5GiB:/a:b/c") == DiskSpec(3 << 29, Path("/a:b/c"))
    assert DiskSpec.parse(" 20gb : ~/x ") == DiskSpec(20 * 10**9, Path("~/x").expanduser())


def test_an_owner_is_all_there() -> None:
    assert Owner(1, 2, 3, (4, 5), 6, 7).heads == (4, 5)
