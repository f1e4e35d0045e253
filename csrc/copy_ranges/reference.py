"""Python reference of `copy_ranges`."""

from __future__ import annotations

import itertools

import torch
from kvpress.csrc.copy_ranges import MOST_THREADS, Operands

from kvpress.ops import shapes


def copy_ranges(operands: Operands) -> None:
    """Writes the bytes of `source` from `begin_A[n]` on to row `to_A[n]` of a target `[P, X]`.

    One range after the other, whatever `threads` is. Raises OperatorError.
    """
    to, begins = check(operands)
    width = operands.target_PX.shape[1]
    # Slices of memory: a tensor for each range would take longer than its bytes.
    target, source = (x.view(-1).numpy().data for x in (operands.target_PX, operands.source))
    for row, begin in zip(to, begins, strict=True) if width else ():
        target[row * width : (row + 1) * width] = source[begin : begin + width]


def check(operands: Operands) -> tuple[list[int], list[int]]:
    """The rows and the first bytes as numbers. Raises OperatorError for what does not fit."""
    op = "copy_ranges"
    target_PX, to_A, source, begin_A, threads = operands
    numbers, memory = {"to_A": to_A, "begin_A": begin_A}, {"target_PX": target_PX, "source": source}
    lengths = shapes.bind(op, {"target_PX": target_PX, "to_A": to_A, "begin_A": begin_A})
    shapes.dense(op, {"source": source})
    shapes.of_dtype(op, torch.uint8, memory)
    shapes.of_dtype(op, torch.int64, numbers)
    if target_PX.device.type != "cpu" or source.device.type != "cpu":
        shapes.refuse(op, "all tensors must be on the CPU")
    if source.dim() != 1:
        shapes.refuse(op, f"source has shape {list(source.shape)}; it must be a list of bytes")
    if not 1 <= threads <= MOST_THREADS:
        shapes.refuse(op, f"threads is {threads}; 1 to {MOST_THREADS} are allowed")
    shapes.apart(op, numbers | memory, {"target_PX"})
    return _rows(to_A.tolist(), lengths["P"]), _begins(begin_A.tolist(), lengths["X"], len(source))


def _rows(to: list[int], rows: int) -> list[int]:
    for index, row in enumerate(to):
        if not 0 <= row < rows:
            shapes.refuse("copy_ranges", f"range {index} goes to row {row} of {rows}")
    for row, following in itertools.pairwise(sorted(to)):
        if row == following:
            shapes.refuse("copy_ranges", f"two ranges go to row {row}")
    return to


def _begins(begins: list[int], width: int, size: int) -> list[int]:
    for index, begin in enumerate(begins):
        if not 0 <= begin <= size - width:
            shapes.refuse(
                "copy_ranges",
                f"range {index} of {width} bytes from {begin} on does not lie in source, which has"
                f" {size} bytes",
            )
    return begins
