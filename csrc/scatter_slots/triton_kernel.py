"""`scatter_slots` with the Triton kernel of `gather_slots`, in the other direction."""

from __future__ import annotations

from kvpress.csrc.gather_slots.reference import places
from kvpress.csrc.gather_slots.triton_kernel import copy
from torch import Tensor

from kvpress import shapes


def scatter_slots(pool_PX: Tensor, address_N: Tensor, slots_NX: Tensor, slot_last: bool) -> None:
    """Writes slot n of `[N, ...]` to `address_N[n]` of a pool; the inverse of `gather_slots`.

    The same as the reference; items of 1, 2, 4 or 8 bytes. Raises OperatorError.
    """
    op = "scatter_slots"
    page_N, slot_N = places(op, pool_PX, address_N, slot_last)
    wanted = (len(address_N), *(pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:]))
    if slots_NX.shape != wanted or slots_NX.dtype != pool_PX.dtype:
        given = f"{list(slots_NX.shape)} {slots_NX.dtype}"
        shapes.refuse(op, f"slots_NX is {given}; it must be {list(wanted)} {pool_PX.dtype}")
    copy(pool_PX, page_N, slot_N, slots_NX.contiguous(), slot_last, into_pool=True)
