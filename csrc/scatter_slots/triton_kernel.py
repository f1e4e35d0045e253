"""`scatter_slots` with the Triton kernel of `gather_slots`, in the other direction."""

from __future__ import annotations

from kvpress.csrc.gather_slots.triton_kernel import copy
from kvpress.csrc.scatter_slots import Operands
from kvpress.csrc.scatter_slots.reference import check


def scatter_slots(operands: Operands) -> None:
    """Writes slot n of `[N, ...]` to `address_A[n]` of a pool; the inverse of `gather_slots`.

    The same as the reference; items of 1, 2, 4 or 8 bytes. Raises OperatorError.
    """
    pool_PX, _, slots_AX, slot_last = operands
    page_A, slot_A = check(operands)
    copy(pool_PX, page_A, slot_A, slots_AX.contiguous(), slot_last, into_pool=True)
