"""Ranges of a file read into an arena, and verified."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema

END, WRONG = -1, -2  # statuses: the file ended too early; the checksum is another
NUMBERS = 7  # of a read
MOST_THREADS = 64


class Operands(NamedTuple):
    """Reads, int64 `[A, 7]`, of a file into an arena of bytes: uint8.

    A read: offset in the file, length, place in the arena, begin of the checked range in it, length
    of that range (0: unchecked), the low and the high 64 bits of its XXH3-128.
    """

    fd: int
    reads_AX: Tensor
    arena: Tensor
    threads: int = 1


SCHEMA = schema("read_records", Operands, "Tensor status_A", writes=("arena",))


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    return operands.reads_AX.new_empty(operands.reads_AX.shape[:1])
