"""PyTorch reference of `gather_slots`."""

from __future__ import annotations

import math

import torch
from kvpress.csrc.gather_slots import Operands
from torch import Tensor

from kvpress.ops import shapes

MOST_BYTES = 8  # of a number


def gather_slots(operands: Operands) -> Tensor:
    """The slots at `address_A` (page · page_slots + slot) of a pool: a fresh `[N, ...]`.

    The pool is `[P, S, ...]`, or `[P, D, S]` where `slot_last`. Raises OperatorError.
    """
    pool_PX, address_A, slot_last = operands
    page_A, slot_A = places("gather_slots", pool_PX, address_A, slot_last)
    return pool_PX[page_A, :, slot_A] if slot_last else pool_PX[page_A, slot_A]


def places(op: str, pool_PX: Tensor, address_A: Tensor, slot_last: bool) -> tuple[Tensor, Tensor]:
    """The page and the slot in it of every address. Raises OperatorError."""
    shapes.dense(op, {"pool_PX": pool_PX, "address_A": address_A})
    shapes.of_dtype(op, torch.int64, {"address_A": address_A})
    shapes.of_dtype(op, pool_PX.dtype, {"pool_PX": pool_PX})
    if pool_PX.device != address_A.device or address_A.dim() != 1:
        shapes.refuse(op, f"address_A {list(address_A.shape)} must be a list on {pool_PX.device}")
    if pool_PX.dim() < 2 or (slot_last and pool_PX.dim() != 3):
        shapes.refuse(op, f"pool_PX has shape {list(pool_PX.shape)}; [P, S, ...] or [P, D, S]")
    if pool_PX.element_size() > MOST_BYTES:
        size = pool_PX.element_size()
        shapes.refuse(op, f"pool_PX has numbers of {size} bytes; at most {MOST_BYTES}")
    pages, page_slots = pool_PX.shape[0], pool_PX.shape[-1] if slot_last else pool_PX.shape[1]
    width = math.prod(pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:])
    if (len(address_A) + pages * page_slots) * (width + 1) * MOST_BYTES >= 2**63:
        shape = list(pool_PX.shape)
        shapes.refuse(op, f"pool_PX has shape {shape}, more slots than memory has bytes")
    on_cpu = address_A.device.type == "cpu" and len(address_A) > 0
    if on_cpu and not 0 <= int(address_A.min()) <= int(address_A.max()) < pages * page_slots:
        shapes.refuse(op, f"address_A names slots outside 0 to {pages * page_slots - 1}")
    return address_A // page_slots, address_A % page_slots
