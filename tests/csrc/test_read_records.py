"""Ranges of a file in an arena: the bytes, what statuses mean, what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reads
import torch
from reads import PAGE, both, row, table

from kvpress import ops
from kvpress.errors import OperatorError

DATA = random.Random(7).randbytes(500_000)
END, WRONG = -1, -2
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file that holds DATA, open for reading and writing."""
    path = tmp_path / "records"
    path.write_bytes(DATA)
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_random_reads_are_those_of_the_reference(fd: int, threads: int) -> None:
    seen = set()
    for seed in range(30):
        rows, size = reads.some(DATA, 1000 * threads + seed)
        status, arena = both(fd, rows, size, threads)
        for (offset, length, place, *_), state in zip(rows, status, strict=True):
            assert state == (0 if offset + length <= len(DATA) else END)
            if not state:
                held = arena[place : place + length].numpy().tobytes()
                assert held == DATA[offset : offset + length]
        seen |= set(status)
    assert seen == {0, END}


def test_reads_at_the_borders_of_pages(fd: int) -> None:
    rows, place = [], 0
    for offset in (0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, len(DATA) - PAGE, len(DATA) - 1):
        for length in (1, PAGE - 1, PAGE, PAGE + 1):
            if offset + length <= len(DATA):
                rows.append(row(DATA, offset, length, place))
                place += length + 3
    status, _ = both(fd, rows, place)
    assert not any(status)


def test_bytes_beside_the_places_stay(fd: int) -> None:
    arena = reads.arena_of(1000)
    assert ops.read_records(fd, table([row(DATA, 5, 100, 300)]), arena).tolist() == [0]
    assert (arena[:300] == 0xEE).all() and (arena[400:] == 0xEE).all()
    assert arena[300:400].numpy().tobytes() == DATA[5:105]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_is_too_short_is_noticed(fd: int, threads: int) -> None:
    rows = [row(DATA, i * 10_000, 10_000, i * 10_000) for i in range(20)]
    for size in (0, 1, 10_000, 25_000, 99_999, 199_999):
        os.ftruncate(fd, size)
        status, _ = both(fd, rows, 200_000, threads)
        assert status == [0 if (i + 1) * 10_000 <= size else END for i in range(20)]
        os.pwrite(fd, DATA, 0)


def test_every_flipped_bit_is_found(fd: int) -> None:
    rng, rows = random.Random(3), [row(DATA, i * 9000, 9000, i * 9000, 50, 8000) for i in range(8)]
    reads_AX, arena = table(rows), reads.arena_of(72_000)
    for _ in range(600):
        place = rng.randrange(72_000)
        os.pwrite(fd, bytes([DATA[place] ^ 1 << rng.randrange(8)]), place)
        status = ops.read_records(fd, reads_AX, arena, rng.choice((1, 2))).tolist()
        covered = 50 <= place % 9000 < 8050
        assert status == [WRONG if i == place // 9000 and covered else 0 for i in range(8)]
        os.pwrite(fd, DATA[place : place + 1], place)
    assert both(fd, rows, 72_000)[0] == [0] * 8


@pytest.mark.parametrize("number", [5, 6])
def test_both_halves_of_a_checksum_count(fd: int, number: int) -> None:
    for bit in range(64):
        wrong = row(DATA, 40, 5000, 0)
        wrong[number] ^= -(2**63) if bit == 63 else 1 << bit
        status, _ = both(fd, [wrong, row(DATA, 40, 5000, 6000)], 12_000)
        assert status == [WRONG, 0]


def test_what_is_not_checked_may_be_anything(fd: int) -> None:
    wrong = [*row(DATA, 0, 5000, 0, 60, 0)[:5], 1, 2]
    assert both(fd, [wrong], 5000)[0] == [0]
    for length in (1, 3, 16, 17, 128, 129, 240, 241, 1024, 70_000):  # XXH3 has a path for each
        assert both(fd, [row(DATA, 3, length, 1)], length + 1)[0] == [0]


def test_reads_of_nothing(fd: int) -> None:
    assert both(fd, [], 10)[0] == [] and both(fd, [], 0)[0] == []
    nothing = [row(DATA, 5, 0, 3), row(DATA, 2**62, 0, 0), row(DATA, 9, 0, 10)]
    assert both(fd, nothing, 10)[0] == [0, 0, 0]
    assert both(closed(fd), nothing, 10)[0] == [0, 0, 0]
    between = [row(DATA, 0, 4, 0), row(DATA, 4, 0, 4), row(DATA, 4, 6, 4)]
    assert both(fd, between, 10)[0] == [0, 0, 0]


def closed(fd: int) -> int:
    """The number of a file that is not open, and that nobody opens meanwhile."""
    number = fcntl.fcntl(fd, fcntl.F_DUPFD, 700)
    os.close(number)
    return number


def test_errors_of_the_system_are_statuses(fd: int, tmp_path: Path) -> None:
    rows = [row(DATA, 0, 100, 0), row(DATA, 100, 100, 100), row(DATA, 900, 100, 500)]
    assert both(closed(fd), rows, 700)[0] == [errno.EBADF] * 3
    folder, (end, start) = os.open(tmp_path, os.O_RDONLY), os.pipe()
    written = os.open(tmp_path / "records", os.O_WRONLY)
    assert both(folder, rows, 700)[0] == [errno.EISDIR] * 3
    assert both(end, rows, 700, 3)[0] == [errno.ESPIPE] * 3
    assert both(written, rows, 700, 3)[0] == [errno.EBADF] * 3
    for number in (folder, start, end, written):
        os.close(number)


def test_direct_reads(fd: int, tmp_path: Path) -> None:
    try:
        direct = os.open(tmp_path / "records", os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no direct reads here: {error}")
    for seed in range(20):
        rows, size = reads.some(DATA, seed, PAGE)
        status, _ = both(direct, rows, size, 1 + seed % 3)
        assert status == [0 if x[0] + x[1] <= len(DATA) else END for x in rows]
    os.close(direct)


def test_many_threads_and_callers_at_once(fd: int) -> None:
    rng, rows = random.Random(1), []
    for i in range(300):
        rows.append(row(DATA, rng.randrange(len(DATA) - 5000), 5000, i * 5000))
    reads_AX, failed = table(rows), []

    def call() -> None:
        for threads in (1, 7, 64):
            arena = reads.arena_of(300 * 5000)
            failed.extend(ops.read_records(fd, reads_AX, arena, threads).tolist())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failed == [0] * (4 * 3 * 300)


MOST = 2**63 - 1
GOOD = [[0, 100, 0, 0, 100, 1, 2], [200, 50, 100, 10, 40, 3, 4]]


def changed(read: int, number: int, value: int) -> dict[str, Any]:
    rows = [list(numbers) for numbers in GOOD]
    rows[read][number] = value
    return {"reads_AX": table(rows)}


@BACKENDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((changed(1, i, -1), "read 1 has a negative number") for i in range(5)),
        (changed(1, 0, -(2**63)), "read 1 has a negative number"),
        (changed(1, 0, MOST), "read 1 .*ends"),
        (changed(1, 0, MOST - 50), "read 1 .*ends"),
        (changed(1, 1, 101), "read 1 ends at 201 in the arena, which has 200 bytes"),
        (changed(1, 1, MOST - 250), "read 1 ends at .* in the arena"),
        (changed(1, 2, 151), "read 1 ends at 201 in the arena"),
        (changed(1, 2, MOST), "read 1 ends at .* in the arena"),
        (changed(1, 3, 11), "read 1 checks up to 51 of 50"),
        (changed(1, 4, MOST), "read 1 checks up to"),
        (changed(1, 2, 99), "two reads go to byte 99"),
        (changed(1, 2, 0), "two reads go to byte 0"),
        (changed(0, 2, 60), "two reads go to byte 100"),
        ({"fd": -1}, "fd is -1; 0 to"),
        ({"fd": 2**31}, "fd is 2147483648"),
        ({"threads": 0}, "threads is 0; 1 to 64"),
        ({"threads": 65}, "threads is 65; 1 to 64"),
        ({"reads_AX": table(GOOD).int()}, "int64"),
        ({"reads_AX": table(GOOD)[:, :6].contiguous()}, r"\[2, 6\]; it must be \[A, 7\]"),
        ({"reads_AX": table(GOOD)[0].contiguous()}, r"\[7\]; it must be \[A, 7\]"),
        ({"reads_AX": table(GOOD * 2)[::2]}, "contiguous"),
        ({"arena": torch.zeros(200, dtype=torch.int8)}, "uint8"),
        ({"arena": torch.zeros(20, 10, dtype=torch.uint8)}, "list of bytes"),
        ({"arena": torch.zeros(400, dtype=torch.uint8)[::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_read(
    fd: int, change: dict[str, Any], message: str, backend: str
) -> None:
    run = ops.read_records
    if backend == "reference":
        run = ops.implementation("read_records", "reference")
    arena = torch.full((200,), 0xEE, dtype=torch.uint8)
    call = {"fd": fd, "reads_AX": table(GOOD), "arena": arena, "threads": 1, **change}
    with pytest.raises(OperatorError, match=message):
        run(**call)
    assert (arena == 0xEE).all()


@BACKENDS
def test_reads_that_lie_in_the_arena_are_refused(fd: int, backend: str) -> None:
    memory = table(GOOD).view(-1)
    run = ops.read_records
    if backend == "reference":
        run = ops.implementation("read_records", "reference")
    with pytest.raises(OperatorError, match="share memory"):
        run(fd, memory[:7].view(1, 7), memory.view(torch.uint8))


def test_read_records_passes_opcheck(fd: int) -> None:
    arena = torch.zeros(5000, dtype=torch.uint8)
    operands = (fd, table([row(DATA, 7, 900, 20)]), arena, 2)
    torch.library.opcheck(torch.ops.kvpress.read_records.default, operands)
