"""Ranges of bytes copied to rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema

MOST_THREADS = 64


class Operands(NamedTuple):
    """Rows of a target, uint8 `[P, X]`, each once; the first byte of each range in a list of bytes.

    Numbers are int64, bytes uint8. All lie on the CPU.
    """

    target_PX: Tensor
    to_A: Tensor
    source: Tensor
    begin_A: Tensor
    threads: int = 1


SCHEMA = schema("copy_ranges", Operands, "()", writes=("target_PX",))


def fake(operands: Operands) -> None:
    """Nothing is returned."""
