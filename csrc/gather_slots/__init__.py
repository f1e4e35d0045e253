"""Dense copies of slots."""

from __future__ import annotations

from torch import Tensor

SCHEMA = "gather_slots(Tensor pool_PX, Tensor address_N, bool slot_last) -> Tensor slots_NX"


def fake(pool_PX: Tensor, address_N: Tensor, slot_last: bool) -> Tensor:
    """An empty result of the right shape and dtype."""
    slot_shape = pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:]
    return pool_PX.new_empty(*address_N.shape, *slot_shape)
