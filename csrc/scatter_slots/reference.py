"""PyTorch reference of `scatter_slots`."""

from __future__ import annotations

from kvpress.csrc.gather_slots.reference import places
from kvpress.csrc.scatter_slots import Operands
from torch import Tensor

from kvpress.ops import shapes


def scatter_slots(operands: Operands) -> None:
    """Writes slot n of `[N, ...]` to `address_N[n]` of a pool; the inverse of `gather_slots`.

    Addresses must differ. Raises OperatorError.
    """
    pool_PX, _, slots_NX, slot_last = operands
    page_N, slot_N = check(operands)
    if slot_last:
        pool_PX[page_N, :, slot_N] = slots_NX
    else:
        pool_PX[page_N, slot_N] = slots_NX


def check(operands: Operands) -> tuple[Tensor, Tensor]:
    """The page and the slot in it of every address. Raises OperatorError."""
    pool_PX, address_N, slots_NX, slot_last = operands
    op = "scatter_slots"
    page_N, slot_N = places(op, pool_PX, address_N, slot_last)
    shapes.dense(op, {"slots_NX": slots_NX})
    wanted = (len(address_N), *(pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:]))
    if slots_NX.shape != wanted or slots_NX.dtype != pool_PX.dtype:
        given = f"{list(slots_NX.shape)} {slots_NX.dtype}"
        shapes.refuse(op, f"slots_NX is {given}; it must be {list(wanted)} {pool_PX.dtype}")
    named = {"pool_PX": pool_PX, "address_N": address_N, "slots_NX": slots_NX}
    shapes.apart(op, named, {"pool_PX"})
    return page_N, slot_N
