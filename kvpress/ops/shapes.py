"""The schema boundary of the operators: what kernels rely on is checked by dimension name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvpress.errors import OperatorError
from kvpress.ops.operands import Bounds
from kvpress.types import MOST_CODED as MOST_CODED
from kvpress.types import MOST_WIDTH as MOST_WIDTH

MOST_SLOTS = 2**31 - 1  # kernels number slots with 32 bits, as positions are
LEAST, MOST = 1e-6, 1e6  # of numbers that logits are multiplied with or divided by
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bind(op: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The length of every letter in names like `query_BNQD`, the same in all tensors.

    All tensors must be on the device of the first one. `1` is a dimension of length 1. Raises
    OperatorError.
    """
    dense(op, tensors)
    lengths: dict[str, int] = {}
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        letters = name.rpartition("_")[2]
        if tensor.device != device:
            refuse(
                op, f"{name} is on {tensor.device}, the first tensor on {device}; use one device"
            )
        if tensor.dim() != len(letters):
            refuse(
                op,
                f"{name} has {tensor.dim()} dimensions {list(tensor.shape)}; {len(letters)} are"
                " allowed, as its name says",
            )
        for letter, length in zip(letters, tensor.shape, strict=True):
            known = 1 if letter == "1" else lengths.setdefault(letter, length)
            if length != known:
                refuse(op, f"{name} has shape {list(tensor.shape)}, but {letter} is {known}")
    return lengths


def dense(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises OperatorError unless all tensors are dense."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # the dispatcher lets None pass
            refuse(op, f"{name} is {tensor}; it must be a tensor")
        if tensor.layout is not torch.strided:
            refuse(op, f"{name} is {tensor.layout}; it must be dense")


def of_dtype(op: str, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> None:
    """Raises OperatorError unless all tensors have the dtype and are contiguous."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            refuse(op, f"{name} is {tensor.dtype}; it must be {dtype}")
        if not tensor.is_contiguous():
            refuse(op, f"{name} must be contiguous; call .contiguous()")


def floating(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises OperatorError unless all tensors have a dtype that kernels compute with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            refuse(op, f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")


def at_least_one(op: str, lengths: Mapping[str, int], letters: str) -> None:
    """Raises OperatorError where one of these letters has length 0."""
    for letter in letters:
        if not lengths[letter]:
            refuse(op, f"{letter} is 0; it must be at least 1")


def at_most(op: str, lengths: Mapping[str, int], letters: str, most: int) -> None:
    """Raises OperatorError where one of these letters is longer."""
    for letter in letters:
        if lengths[letter] > most:
            refuse(op, f"{letter} is {lengths[letter]}; at most {most} are supported")


def heads(op: str, lengths: Mapping[str, int], letters: str) -> None:
    """Raises OperatorError unless N query heads of D channels share H KV heads.

    letters: those that must not be 0.
    """
    at_least_one(op, lengths, letters)
    at_most(op, lengths, "D", MOST_WIDTH)
    at_most(op, lengths, "S", MOST_SLOTS)
    if lengths["N"] % lengths["H"]:
        refuse(op, f"{lengths['N']} query heads are no multiple of {lengths['H']} KV heads")


def prompt(op: str, lengths: Mapping[str, int]) -> None:
    """Raises OperatorError unless Q queries own the last of S slots, and heads fit."""
    heads(op, lengths, "BNHDQS")
    if lengths["Q"] > lengths["S"]:
        refuse(op, f"{lengths['Q']} queries for {lengths['S']} slots; 1 to S are allowed")


def logits(op: str, scaling: float, softcap: float = 0.0) -> None:
    """Raises OperatorError for numbers with which logits in 32 bits would be no numbers."""
    if not abs(scaling) <= MOST:
        refuse(op, f"scaling is {scaling}; −1e6 to 1e6 are allowed")
    if softcap and not LEAST <= softcap <= MOST:
        refuse(op, f"softcap is {softcap}; it must be positive (1e-6 to 1e6), or 0 for none")


def temperature(op: str, tau: float) -> None:
    """Raises OperatorError for a τ by which logits in 32 bits cannot be divided."""
    if not LEAST <= tau <= MOST:
        refuse(op, f"tau is {tau}; it must be positive (1e-6 to 1e6)")


def ages(op: str, bounds: Bounds, least: int) -> None:
    """Raises OperatorError for counts of tokens that cannot be. Only on the CPU."""
    seen_B, _, recent_R, sink_B, _ = bounds
    if seen_B.device.type != "cpu":
        return
    if bool(((seen_B < least) | (seen_B > MOST_SLOTS)).any()):
        refuse(op, f"seen_B is {seen_B.tolist()}; {least} to {MOST_SLOTS} are allowed")
    if bool((recent_R < 0).any()):
        refuse(op, f"recent_R is {recent_R.tolist()}; it must not be negative")
    if bool(((sink_B < 0) | (sink_B > MOST_SLOTS)).any()):
        refuse(op, f"sink_B is {sink_B.tolist()}; 0 to {MOST_SLOTS} are allowed")


def apart(op: str, tensors: Mapping[str, Tensor], written: Collection[str]) -> None:
    """Raises OperatorError where memory that is written is another operand's. On the CPU."""
    spans: list[tuple[str, int, int]] = []
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        spans.append((name, begin, begin + (last + 1) * tensor.element_size()))
    for i, (one, begin, end) in enumerate(spans):
        for other, first, last in spans[i + 1 :]:
            if (one in written or other in written) and begin < last and first < end:
                refuse(op, f"{one} and {other} share memory, which is written; give them their own")


def paged(
    op: str, lengths: Mapping[str, int], table_RW: Tensor, counts_R: Tensor, appended: int = 0
) -> None:
    """Raises OperatorError unless every row's slots lie in pages that exist.

    Only on the CPU: on other devices reading the table would stop the device at every step.
    """
    batch, rows, query_heads = lengths["B"], lengths["R"], lengths["N"]
    if not query_heads or not rows or not batch or rows % batch or query_heads % (rows // batch):
        refuse(
            op,
            f"table_RW has {rows} rows; B = {batch} and N = {query_heads} need a multiple of B"
            " whose number of KV heads divides N",
        )
    at_least_one(op, lengths, "DES")
    at_most(op, lengths, "DE", MOST_WIDTH)
    room = table_RW.shape[1] * lengths["S"]
    if max(lengths["S"], room) > MOST_SLOTS:
        refuse(op, f"rows have room for {room} slots; at most {MOST_SLOTS} are supported")
    if counts_R.device.type != "cpu":
        return
    if bool(((counts_R < 0) | (counts_R > room - appended)).any()):
        more = " and get another" if appended else ""
        held = counts_R.tolist()
        refuse(op, f"rows hold {held} slots{more}, but table_RW has room for {room}")
    wrong_RW = used(table_RW, counts_R + appended, lengths["S"])
    wrong_RW &= (table_RW < 0) | (table_RW >= lengths["P"])
    if bool(wrong_RW.any()):
        page = int(table_RW[wrong_RW][0])
        refuse(op, f"table_RW names page {page}; pages 0 to {lengths['P'] - 1} exist")


def used(table_RW: Tensor, counts_R: Tensor, page_slots: int) -> Tensor:
    """True for the entries of a table that hold slots of their row; others may be anything."""
    first_W = torch.arange(table_RW.shape[1], device=table_RW.device) * page_slots
    return first_W < counts_R[:, None]


def refuse(op: str, why: str) -> None:
    """Raises OperatorError."""
    raise OperatorError(f"kvpress::{op}: {why}.")
