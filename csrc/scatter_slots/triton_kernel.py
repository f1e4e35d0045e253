"""`scatter_slots` with the Triton kernel of `gather_slots`, in the other direction."""

from __future__ import annotations

from kvpress.csrc.gather_slots.triton_kernel import copy
from kvpress.csrc.scatter_slots.reference import check
from torch import Tensor


def scatter_slots(pool_PX: Tensor, address_N: Tensor, slots_NX: Tensor, slot_last: bool) -> None:
    """Writes slot n of `[N, ...]` to `address_N[n]` of a pool; the inverse of `gather_slots`.

    The same as the reference; items of 1, 2, 4 or 8 bytes. Raises OperatorError.
    """
    page_N, slot_N = check(pool_PX, address_N, slots_NX, slot_last)
    copy(pool_PX, page_N, slot_N, slots_NX.contiguous(), slot_last, into_pool=True)
