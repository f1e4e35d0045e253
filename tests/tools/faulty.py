"""Tests of `read_records` for a process whose preadv is that of faults.cpp.

What the system may answer a read: interruptions, short counts, errors, delays. Never a hang.
tests/csrc/test_read_faults.py runs them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import reads
from reads import PAGE, row, table

from kvpress import ops

DATA = random.Random(7).randbytes(300_000)
END = -1


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Opens a file that holds DATA, with flags."""
    path, opened = tmp_path / "records", []
    path.write_bytes(DATA)

    def open_with(flags: int = 0) -> int:
        opened.append(os.open(path, os.O_RDONLY | flags))
        return opened[-1]

    yield open_with
    for fd in opened:
        os.close(fd)


def plan(text: str, endless: bool = False, broken: int = -1) -> Any:
    """Sets what preadv does from now on; returns the library, which counts."""
    shim = ctypes.CDLL(None)
    shim.faults_plan(text.encode(), int(endless), ctypes.c_long(broken))
    return shim


def read(fd: int, rows: list[list[int]], size: int, threads: int = 1) -> list[int]:
    """Statuses; where one is 0 the bytes are those of the file, and no others were written."""
    arena = reads.arena_of(size)
    status = ops.read_records(fd, table(rows), arena, threads).tolist()
    for (offset, length, place, *_), state in zip(rows, status, strict=True):
        held = arena[place : place + length].numpy().tobytes()
        assert state or held == DATA[offset : offset + length]
        arena[place : place + length] = 0xEE
    assert (arena == 0xEE).all()
    return status


APART = [row(DATA, 9000 * i, 5000, 7000 * i) for i in range(12)]


def test_the_library_stands_between(file: Any) -> None:
    shim = plan("e")
    assert read(file(), APART[:2], 90_000) == [errno.EIO, 0] and shim.faults_calls() == 2


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("text", ["i", "s", "p", "is", "sip.", "iiiip", "s" * 7])
def test_interrupted_and_short_reads_go_on(file: Any, text: str, threads: int) -> None:
    plan(text, endless="i" not in text or len(set(text)) > 1)
    assert read(file(), APART, 90_000, threads) == [0] * 12


@pytest.mark.parametrize(
    ("text", "status"),
    [("i", errno.EINTR), ("e", errno.EIO), ("z", END), ("si", errno.EINTR), ("v", errno.EINVAL)],
)
def test_what_never_succeeds_ends_with_a_status(file: Any, text: str, status: int) -> None:
    shim = plan(text, endless=text != "si")
    rows = APART
    if text == "si":
        shim, rows = plan("s" + "i" * 500), APART[:1]
    assert read(file(), rows, 90_000) == [status] * len(rows)
    assert shim.faults_calls() < 110 * len(rows)


def test_an_error_concerns_its_read_alone(file: Any) -> None:
    for at in range(12):
        plan("." * at + "e")
        wanted = [errno.EIO if i == at else 0 for i in range(12)]
        assert read(file(), APART, 90_000) == wanted
        plan("." * at + "z")
        assert read(file(), APART, 90_000) == [END if i == at else 0 for i in range(12)]
    plan("s.e")  # in the midst of a read
    assert read(file(), APART[:2], 90_000) == [0, errno.EIO]


def test_neighbours_share_calls(file: Any) -> None:
    rows = [row(DATA, PAGE + 3000 * i, 3000, 100 + 3000 * i) for i in range(90)]
    shim = plan("")
    assert read(file(), rows, 300_000) == [0] * 90
    assert shim.faults_calls() == 1 and shim.faults_longest() == 270_000
    shim = plan("")
    assert read(file(), rows[::-1], 300_000) == [0] * 90 and shim.faults_calls() == 90
    gaps = [[*x[:2], x[2] + i, *x[3:]] for i, x in enumerate(rows)]
    shim = plan("")
    assert read(file(), gaps, 300_000) == [0] * 90 and shim.faults_calls() == 90


@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_place_of_the_disk_costs_its_read_alone(file: Any, threads: int) -> None:
    rows = [row(DATA, PAGE + 3000 * i, 3000, 3000 * i) for i in range(90)]
    for at in (0, 1, 44, 89):
        plan("", broken=PAGE + 3000 * at + 1234)
        wanted = [errno.EIO if i == at else 0 for i in range(90)]
        assert read(file(), rows, 300_000, threads) == wanted


def test_reads_that_go_wrong_in_every_way(file: Any) -> None:
    rng, fd = random.Random(5), file()
    for seed in range(300):
        rows, size = reads.some(DATA, seed)
        plan("".join(rng.choices("..sspizev", k=60)), endless=seed % 2 == 0)
        status = read(fd, rows, size, rng.choice((1, 1, 2, 5)))
        assert set(status) <= {0, END, errno.EIO, errno.EINTR, errno.EINVAL}


@pytest.mark.parametrize("text", ["s", "p", "pi", "."])
def test_direct_reads_go_on_from_a_whole_sector(file: Any, text: str) -> None:
    try:
        fd = file(os.O_DIRECT)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no direct reads here: {error}")
    whole = len(DATA) // PAGE * PAGE
    rows = [row(DATA, 0, 5 * PAGE, 0), row(DATA, 9 * PAGE, 4 * PAGE, 5 * PAGE)]
    rows += [row(DATA, whole - PAGE, 3 * PAGE, 10 * PAGE)]  # beyond the end
    endless = text != "s"  # of which a sector never comes whole
    plan(text if endless else "s." * 4, endless)
    assert read(fd, rows, 20 * PAGE) == [0, 0, END]
    rng = random.Random(6)
    for seed in range(60):
        rows, size = reads.some(DATA, seed, PAGE)
        plan("".join(rng.choices("..sspizev", k=60)), endless=seed % 2 == 0)
        assert set(read(fd, rows, size)) <= {0, END, errno.EIO, errno.EINTR, errno.EINVAL}


@pytest.mark.parametrize("threads", [1, 3])
def test_other_threads_run_while_a_read_waits(file: Any, threads: int) -> None:
    """PyTorch gives the interpreter's lock up while an operator runs."""
    fd, reads_AX, arena = file(), table(APART), reads.arena_of(90_000)
    ops.read_records(fd, reads_AX, arena, 1)
    plan("d")
    reader = threading.Thread(target=ops.read_records, args=(fd, reads_AX, arena, threads))
    reader.start()
    ticks = 0
    while reader.is_alive():
        time.sleep(0.005)
        ticks += 1
    assert ticks > 20  # in half a second; with the lock held, one or two
