"""The schema boundary of the operators: what kernels rely on is checked by dimension name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpress.errors import OperatorError

MOST_WIDTH = 256  # channels of a head
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bind(op: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The length of every letter in names like `query_BNQD`, the same in all tensors.

    All tensors must be on the device of the first one. `1` is a dimension of length 1. Raises
    OperatorError.
    """
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


def paged(
    op: str, lengths: Mapping[str, int], table_RW: Tensor, counts_R: Tensor, appended: int = 0
) -> None:
    """Raises OperatorError unless every row's slots lie in pages that exist.

    Only on the CPU: on other devices reading the table would stop the device at every step.
    """
    batch, rows, heads = lengths["B"], lengths["R"], lengths["N"]
    if not rows or not batch or rows % batch or heads % (rows // batch):
        refuse(
            op,
            f"table_RW has {rows} rows; B = {batch} and N = {heads} need a multiple of B whose"
            " number of KV heads divides N",
        )
    if max(lengths["D"], lengths["E"]) > MOST_WIDTH:
        refuse(
            op,
            f"heads of {lengths['D']} and {lengths['E']} channels; at most {MOST_WIDTH} are"
            " supported",
        )
    if counts_R.device.type != "cpu":
        return
    slots_R = counts_R + appended
    room = table_RW.shape[1] * lengths["S"]
    if bool((counts_R < 0).any()) or int(slots_R.max()) > room:
        refuse(op, f"rows hold {slots_R.tolist()} slots, but table_RW has room for {room}")
    page_W = torch.arange(table_RW.shape[1]) * lengths["S"]
    used_RW = page_W < slots_R[:, None]
    wrong_RW = used_RW & ((table_RW < 0) | (table_RW >= lengths["P"]))
    if bool(wrong_RW.any()):
        page = int(table_RW[wrong_RW][0])
        refuse(op, f"table_RW names page {page}; pages 0 to {lengths['P'] - 1} exist")


def refuse(op: str, why: str) -> None:
    """Raises OperatorError."""
    raise OperatorError(f"kvpress::{op}: {why}.")
