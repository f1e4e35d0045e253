"""Reads of `read_records`: rows with the checksums of what a file should hold."""

from __future__ import annotations

import random
import struct

import torch
import xxhash
from torch import Tensor

from kvpress import ops
from kvpress.ops.registry import implementation

PAGE = 4096


def row(
    data: bytes, offset: int, length: int, place: int, begin: int = 0, checked: int | None = None
) -> list[int]:
    """A read whose expected checksum is that of `data`; all that it reads from `begin` on."""
    checked = length - begin if checked is None else checked
    part = data[offset + begin : offset + begin + checked]
    high, low = struct.unpack(">qq", xxhash.xxh3_128_digest(part))
    return [offset, length, place, begin, checked, low, high]


def table(rows: list[list[int]]) -> Tensor:
    """What the operator takes."""
    return torch.tensor(rows, dtype=torch.int64).view(-1, 7)


def arena_of(size: int) -> Tensor:
    """Bytes of which none is 0, from a page's begin on."""
    memory = torch.full((size + PAGE,), 0xEE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:size]


def some(data: bytes, seed: int, aligned: int = 1) -> tuple[list[list[int]], int]:
    """Random reads whose places do not overlap, many of them neighbours; the arena's size."""
    rng, rows, place, offset = random.Random(seed), [], 0, 0
    for _ in range(rng.choice((1, 5, 40))):
        length = rng.choice((1, 7, 255, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 70000))
        length = -(-length // aligned) * aligned
        if rng.random() < 0.5:
            offset = rng.randrange(len(data) // aligned) * aligned
            place += rng.randrange(3) * max(aligned, 5)
        begin = rng.randrange(length + 1)
        rows.append(row(data, offset, length, place, begin, rng.randrange(length - begin + 1)))
        offset, place = offset + length, place + length
    rng.shuffle(rows) if rng.random() < 0.3 else None
    return rows, place + 9


def both(fd: int, rows: list[list[int]], size: int, threads: int = 1) -> tuple[list[int], Tensor]:
    """Statuses and arena, which must be those of the reference too."""
    reads_AX, arena, other = table(rows), arena_of(size), arena_of(size)
    status = ops.read_records(fd, reads_AX, arena, threads)
    wanted = implementation("read_records", "reference")(fd, reads_AX, other)
    assert status.dtype == torch.int64 and torch.equal(status, wanted)
    for read, state in zip(rows, status.tolist(), strict=True):
        if state:  # then its place may hold anything
            arena[read[2] : read[2] + read[1]] = other[read[2] : read[2] + read[1]] = 0
    assert torch.equal(arena, other)
    return status.tolist(), arena
