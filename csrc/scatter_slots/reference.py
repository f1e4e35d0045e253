"""PyTorch reference of `scatter_slots`."""

from __future__ import annotations

from kvpress.csrc.gather_slots.reference import places
from kvpress.csrc.scatter_slots import Operands
from torch import Tensor

from kvpress.ops import shapes


def scatter_slots(operands: Operands) -> None:
    """Writes slot n of `[N, ...]` to `address_A[n]` of a pool; the inverse of `gather_slots`.

    Addresses must differ. Raises OperatorError.
    """
    pool_PX, _, slots_AX, slot_last = operands
    page_A, slot_A = check(operands)
    if slot_last:
        pool_PX[page_A, :, slot_A] = slots_AX
    else:
        pool_PX[page_A, slot_A] = slots_AX


def check(operands: Operands) -> tuple[Tensor, Tensor]:
    """The page and the slot in it of every address. Raises OperatorError."""
    pool_PX, address_A, slots_AX, slot_last = operands
    op = "scatter_slots"
    page_A, slot_A = places(op, pool_PX, address_A, slot_last)
    shapes.dense(op, {"slots_AX": slots_AX})
    wanted = (len(address_A), *(pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:]))
    if slots_AX.shape != wanted or slots_AX.dtype != pool_PX.dtype:
        given = f"{list(slots_AX.shape)} {slots_AX.dtype}"
        shapes.refuse(op, f"slots_AX is {given}; it must be {list(wanted)} {pool_PX.dtype}")
    named = {"pool_PX": pool_PX, "address_A": address_A, "slots_AX": slots_AX}
    shapes.apart(op, named, {"pool_PX"})
    return page_A, slot_A
