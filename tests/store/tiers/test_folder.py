"""The folder of a disk tier: one store at a time, nothing left behind, any file system."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiers
import torch

from kvpress import TierError
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.folder import LOCK

HOLDER = """
import sys, pathlib, torch
from kvpress.store.tiers.vault import Vault
from kvpress.store.tiers.record import Facts, Owner
from kvpress.store.tiers.folder import DiskSpec
disk = DiskSpec(1 << 20, pathlib.Path(sys.argv[1]))
store = Vault(Facts("other"), 0, disk, in_flight_bytes=1 << 20)
store.put(torch.ones(2, 5000, dtype=torch.uint8), Owner(0, 0, 0, (0, 1), 0, 1))
print("ready", flush=True)
sys.stdin.read()
store.close()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that uses the folder, until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_process_gets_an_error_and_the_folder_when_the_first_is_gone(
    tmp_path: Path,
) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(TierError, match=rf"used by process {first.pid} \(store [0-9a-f]{{32}}"):
            tiers.vault(tmp_path)
        assert tiers.left(tmp_path) == [LOCK]
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait(30) == 0
    assert tiers.left(tmp_path) == []
    tiers.vault(tmp_path).close()


def test_what_a_killed_process_leaves_is_a_lock_that_the_next_takes_over(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(30)
    assert tiers.left(tmp_path) == [LOCK]
    store = tiers.vault(tmp_path)
    assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    store.close()
    assert tiers.left(tmp_path) == []


def test_a_process_that_ends_without_closing_leaves_nothing(tmp_path: Path) -> None:
    program = HOLDER.replace("store.close()", "")
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], input="", check=True, capture_output=True
    )
    assert tiers.left(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_take_the_lock_away(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path)
    child = os.fork()
    if not child:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert tiers.left(tmp_path) == [LOCK]
    assert torch.equal(tiers.read(store, store.put(x := tiers.slices(), tiers.owner())), x)
    store.close()


def test_a_name_that_is_no_path(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(TierError, match="disk tier"):
            tiers.vault(tmp_path / name)


def test_stores_of_one_process_share_the_lock_until_the_last_is_closed(tmp_path: Path) -> None:
    first, second = tiers.vault(tmp_path), tiers.vault(tmp_path)
    first.close()
    first.close()
    assert tiers.left(tmp_path) == [LOCK]
    with open(tmp_path / LOCK) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another process would
    second.close()
    assert tiers.left(tmp_path) == []


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(tmp_path: Path) -> None:
    def removed(count: int, real: Any, fd: int) -> None:
        if count == 1:
            (tmp_path / LOCK).unlink()  # as a holder does that closes now
        real(fd)

    calls = tiers.Faulty(lock=removed)
    store = tiers.vault(tmp_path, calls=calls)
    assert calls.counts["lock"] == 2
    with open(tmp_path / LOCK) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    store.close()


def test_the_file_has_no_name_and_is_only_for_its_user(tmp_path: Path) -> None:
    calls = tiers.Faulty()
    store = tiers.vault(tmp_path, 16, calls=calls)
    assert tiers.left(tmp_path) == [LOCK]
    for fd in calls.files:
        found = os.fstat(fd)
        assert (found.st_mode & 0o7777, found.st_nlink, found.st_size) == (0o600, 0, 32 * UNIT)
    assert (tmp_path / LOCK).stat().st_mode & 0o7777 == 0o600
    store.close()


def test_a_file_system_without_nameless_files(tmp_path: Path) -> None:
    def plain(count: int, real: Any, path: Any, flags: int, *mode: Any) -> Any:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *mode)

    calls = tiers.Faulty(open=plain)
    store = tiers.vault(tmp_path, calls=calls)
    assert tiers.left(tmp_path) == [LOCK]
    assert os.fstat(calls.files[-1]).st_mode & 0o7777 == 0o600
    assert torch.equal(tiers.read(store, store.put(x := tiers.slices(), tiers.owner())), x)
    store.close()
    assert tiers.left(tmp_path) == []


@pytest.mark.parametrize("direct", [True, False])
def test_direct_io_is_used_where_it_works_and_reported(tmp_path: Path, direct: bool) -> None:
    calls = tiers.Faulty() if direct else tiers.Faulty(open=tiers.no_direct)
    store = tiers.vault(tmp_path, calls=calls)
    if direct and not store.counters.direct:
        pytest.skip("this file system has no direct I/O")
    assert store.counters.direct == direct
    before = calls.counts["forget"]
    sent = [tiers.slices() for _ in range(20)]
    records = [store.put(x, tiers.owner()) for x in sent]
    assert all(torch.equal(tiers.read(store, r), x) for r, x in zip(records, sent, strict=True))
    assert (calls.counts["forget"] > before) != direct  # the page cache does not fill
    store.close()


@pytest.mark.parametrize("started", [True, False], ids=["later", "at start"])
@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_direct_io_that_is_refused(tmp_path: Path, name: str, started: bool) -> None:
    def refused(count: int, real: Any, fd: int, buffers: Any, offset: int) -> Any:
        if fd == calls.files[1] and refuses:
            raise OSError(errno.EINVAL, "not aligned as I want it")
        return real(fd, buffers, offset)

    calls, refuses = tiers.Faulty(**{name: refused}), not started
    store = tiers.vault(tmp_path, calls=calls)
    assert not (store.counters.direct and refuses)
    refuses = True
    record = store.put(sent := tiers.slices(), tiers.owner())
    assert torch.equal(tiers.read(store, record), sent)
    store.close()
    assert tiers.left(tmp_path) == []


def test_a_file_system_without_allocation_gets_zeros_once(tmp_path: Path) -> None:
    calls = tiers.Faulty(allocate=tiers.fails(errno.EOPNOTSUPP), pwritev=tiers.short(100_000))
    store = tiers.vault(tmp_path, 40, calls=calls)
    found = os.fstat(calls.files[0])
    assert found.st_size == 80 * UNIT and found.st_blocks * 512 >= 80 * UNIT
    assert torch.equal(tiers.read(store, store.put(x := tiers.slices(), tiers.owner())), x)
    store.close()


FULL = {
    "no room": {"free_bytes": lambda count, real, folder: 4096},
    "allocation": {"allocate": tiers.fails(errno.ENOSPC)},
    "quota": {"allocate": tiers.fails(errno.EDQUOT)},
    "file size": {"allocate": tiers.fails(errno.EFBIG)},
    "zeros": {
        "allocate": tiers.fails(errno.EOPNOTSUPP),
        "pwritev": tiers.fails(errno.ENOSPC, first=2),
    },
    "no progress": {
        "allocate": tiers.fails(errno.EOPNOTSUPP),
        "pwritev": lambda count, real, *arguments: 0,
    },
}


@pytest.mark.parametrize("faults", FULL.values(), ids=FULL)
def test_a_full_disk_at_start_leaves_nothing(tmp_path: Path, faults: dict[str, Any]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierError, match=r"needs 2097152 bytes in .*, where \d+ are free"):
        tiers.vault(tmp_path, 256, calls=tiers.Faulty(**faults))
    assert tiers.left(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["open", "lock", "free_bytes", "allocate"])
def test_an_error_at_start_leaves_nothing(tmp_path: Path, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierError, match=r"cannot hold a disk tier: .*Input/output"):
        tiers.vault(tmp_path, calls=tiers.Faulty(**{name: tiers.fails(errno.EIO)}))
    assert set(tiers.left(tmp_path)) <= {LOCK}  # whose owner is not known where locking failed
    assert len(os.listdir("/proc/self/fd")) == before
    tiers.vault(tmp_path).close()


def test_a_folder_must_be_one_and_writable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cases = {tmp_path / "none": "does not exist", file: "is no folder"}
    for folder, reason in cases.items():
        with pytest.raises(TierError, match=f"{folder} of the disk tier {reason}. Give one"):
            tiers.vault(folder)
    assert tiers.left(tmp_path) == ["file"]


def test_a_folder_that_others_own(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # root may write everywhere, but not there:
        closed = Path("/proc/self")
        with pytest.raises(TierError, match="disk tier"):
            tiers.vault(closed)
        return
    with pytest.raises(TierError, match="cannot be written to by this user"):
        tiers.vault(closed)


def test_more_than_the_disk_has_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    calls = tiers.Faulty()
    with pytest.raises(TierError, match="needs"):
        tiers.vault(tmp_path, 1 << 40, calls=calls)
    assert calls.counts["allocate"] == 0 and tiers.left(tmp_path) == []
