"""PyTorch reference of `gather_slots`."""

from __future__ import annotations

from torch import Tensor


def gather_slots(pool_PSX: Tensor, address_N: Tensor) -> Tensor:
    """The slots at `address_N` (page · page_slots + slot) of a pool: a fresh `[N, ...]`."""
    return pool_PSX.flatten(0, 1).index_select(0, address_N)
