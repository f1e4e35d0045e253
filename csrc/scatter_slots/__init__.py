"""Slots written into pages."""

from __future__ import annotations

from torch import Tensor

SCHEMA = (
    "scatter_slots(Tensor(a!) pool_PX, Tensor address_N, Tensor slots_NX, bool slot_last) -> ()"
)


def fake(pool_PX: Tensor, address_N: Tensor, slots_NX: Tensor, slot_last: bool) -> None:
    """Nothing is returned."""
