"""The disk tier's reads beside plain ones of the same records in the same folder, in turn."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import xxhash
from kvpress.bench.common.journal import Row
from kvpress.bench.common.timing import Samples, interleave

from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.folder import DiskSpec
from kvpress.store.tiers.record import Facts, Owner, Record
from kvpress.store.tiers.vault import Vault

_HEADS = 4  # slices of a record
_AHEAD = 8  # records that are on their way at once
_HASHES = 64  # records that the checksum is timed on


class Probe(NamedTuple):
    """What is read: so many records of so many bytes, headers included. rounds: of all of them."""

    records: int
    record_bytes: int
    rounds: int


def measure(folder: Path, probe: Probe) -> Row:
    """Bytes per second of the store and of `preadv` with as many threads, and what checksums cost.

    checksum: seconds of one record's, of those in which a thread reads and verifies one.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="kvpress-") as own:
        vault = Vault(Facts("a probe"), 0, DiskSpec(_room(probe), Path(own)), deadline_s=60.0)
        try:
            records = _filled(vault, probe)
            with _raw_file(Path(own), probe, vault.counters.direct) as fd:
                reads = {f"preadv, {n} threads": n for n in (1, vault.workers)}
                calls: dict[str, Any] = {
                    "the store": lambda _: _through_store(vault, records),
                    **{x: partial(_preadv, fd, probe, n) for x, n in reads.items()},
                }
                samples = interleave(calls, probe.rounds, 1)
            flow, direct = vault.counters.from_disk, vault.counters.direct
        finally:
            vault.close()
    size = probe.records * probe.record_bytes
    hashed = _hash_seconds(probe.record_bytes)
    return {
        **probe._asdict(),
        "direct": direct,
        "threads": vault.workers,
        "rates": {name: size / taken.median for name, taken in samples.items()},
        "seconds": {name: taken.to_dict() for name, taken in samples.items()},
        "checksum": hashed / (flow.seconds / flow.count),
        "share_of_raw": _share(samples),
    }


def _share(samples: dict[str, Samples]) -> float:
    """The store's rate over the best plain one."""
    raw = min(taken.median for name, taken in samples.items() if name != "the store")
    return raw / samples["the store"].median


def _room(probe: Probe) -> int:
    return (probe.records + 2) * probe.record_bytes


def _filled(vault: Vault, probe: Probe) -> list[Record]:
    slice_bytes = (probe.record_bytes - UNIT) // _HEADS
    records = []
    for number in range(probe.records):
        slices_AX = torch.randint(256, (_HEADS, slice_bytes), dtype=torch.uint8, device="cpu")
        owner = Owner(0, 0, 0, tuple(range(_HEADS)), number, 1)
        records.append(vault.put(slices_AX, owner))
    return records


def _through_store(vault: Vault, records: Sequence[Record]) -> None:
    waiting = [vault.fetch(record) for record in records[:_AHEAD]]
    for record in [*records[_AHEAD:], *[None] * min(_AHEAD, len(records))]:
        with waiting.pop(0) as ticket:
            ticket.wait()
        if record is not None:
            waiting.append(vault.fetch(record))


@contextmanager
def _raw_file(folder: Path, probe: Probe, direct: bool) -> Iterator[int]:
    """A file of as many bytes, open as the store's is."""
    path = folder / "probe"
    with path.open("wb") as file:
        for _ in range(probe.records):
            file.write(os.urandom(probe.record_bytes))
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        yield fd
    finally:
        os.close(fd)


def _preadv(fd: int, probe: Any, threads: int, _: object) -> Any:
    return _through_preadv(fd, probe, threads)


def _through_preadv(fd: int, probe: Probe, threads: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: _read_some(fd, probe, first, threads), range(threads)))


def _read_some(fd: int, probe: Probe, first: int, step: int) -> None:
    with mmap.mmap(-1, probe.record_bytes) as buffer, memoryview(buffer) as view:
        for number in range(first, probe.records, step):
            done = 0
            while done < probe.record_bytes:
                at = number * probe.record_bytes + done
                done += os.preadv(fd, [view[done:]], at)


def _hash_seconds(size: int) -> float:
    """Of the checksum of so many bytes, by the same function; of bytes that no cache holds."""
    data = os.urandom(size * _HASHES)
    begun = perf_counter()
    for number in range(_HASHES):
        xxhash.xxh3_128_digest(memoryview(data)[number * size : (number + 1) * size])
    return (perf_counter() - begun) / _HASHES
