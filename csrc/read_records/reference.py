"""Python reference of `read_records`."""

from __future__ import annotations

import ctypes
import itertools
import os

import torch
import xxhash
from kvpress.csrc.read_records import END, MOST_THREADS, NUMBERS, WRONG, Operands
from torch import Tensor

from kvpress.ops import shapes

MOST = 2**63 - 1
_WORD = 2**64 - 1


def read_records(operands: Operands) -> Tensor:
    """The status of every read, int64 `[A]`: 0, an errno, `END` or `WRONG`. Writes into the arena.

    One read after the other, whatever `threads` is. Raises OperatorError.
    """
    fd, reads_AX, arena, _ = operands
    reads = check(operands)
    held = (ctypes.c_char * arena.numel()).from_address(arena.data_ptr())
    memory = memoryview(held).cast("B")
    status = [_read(fd, memory, read) for read in reads]
    return torch.tensor(status, dtype=torch.int64, device=reads_AX.device)


def _read(fd: int, memory: memoryview, read: list[int]) -> int:
    """The status of one read."""
    offset, length, place, begin, checked, low, high = read
    done = 0
    while done < length:
        try:  # which tries again after EINTR
            came = os.preadv(fd, [memory[place + done : place + length]], offset + done)
        except OSError as error:
            return error.errno or END
        if not came:
            return END
        done += came
    found = xxhash.xxh3_128_intdigest(memory[place + begin : place + begin + checked])
    right = found == (high & _WORD) << 64 | low & _WORD
    return 0 if right or not checked else WRONG


def check(operands: Operands) -> list[list[int]]:
    """The reads as numbers. Raises OperatorError for those that do not fit."""
    op = "read_records"
    fd, reads_AX, arena, threads = operands
    shapes.dense(op, {"reads_AX": reads_AX, "arena": arena})
    shapes.of_dtype(op, torch.int64, {"reads_AX": reads_AX})
    shapes.of_dtype(op, torch.uint8, {"arena": arena})
    if reads_AX.device.type != "cpu" or arena.device.type != "cpu":
        shapes.refuse(op, "reads_AX and arena must be on the CPU")
    if reads_AX.dim() != 2 or reads_AX.shape[1] != NUMBERS:
        shapes.refuse(op, f"reads_AX has shape {list(reads_AX.shape)}; it must be [A, {NUMBERS}]")
    if arena.dim() != 1:
        shapes.refuse(op, f"arena has shape {list(arena.shape)}; it must be a list of bytes")
    if not 0 <= fd < 2**31:
        shapes.refuse(op, f"fd is {fd}; 0 to {2**31 - 1} are allowed")
    if not 1 <= threads <= MOST_THREADS:
        shapes.refuse(op, f"threads is {threads}; 1 to {MOST_THREADS} are allowed")
    shapes.apart(op, {"reads_AX": reads_AX, "arena": arena}, {"arena"})
    reads: list[list[int]] = reads_AX.tolist()
    for index, read in enumerate(reads):
        _check_read(index, read, arena.numel())
    places = sorted((place, length) for _, length, place, *_ in reads if length)
    for (place, length), (following, _) in itertools.pairwise(places):
        if following < place + length:
            shapes.refuse(op, f"two reads go to byte {following} of the arena")
    return reads


def _check_read(index: int, read: list[int], size: int) -> None:
    offset, length, place, begin, checked, *_ = read
    if min(offset, length, place, begin, checked) < 0:
        why = f"has a negative number: {read[:5]}"
    elif offset + length >= MOST:
        why = f"ends at {offset + length} in the file; less than {MOST} is allowed"
    elif place + length > size:
        why = f"ends at {place + length} in the arena, which has {size} bytes"
    elif begin + checked > length:
        why = f"checks up to {begin + checked} of {length} bytes"
    else:
        return
    shapes.refuse("read_records", f"read {index} {why}")
