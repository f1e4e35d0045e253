"""Dense copies of slots."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """A pool `[P, S, ...]`, or `[P, D, S]` with slot_last; addresses are page · S + slot."""

    pool_PX: Tensor
    address_A: Tensor
    slot_last: bool = False


SCHEMA = schema("gather_slots", Operands, "Tensor slots_AX")


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    pool_PX, address_A, slot_last = operands
    slot_shape = pool_PX.shape[1:-1] if slot_last else pool_PX.shape[2:]
    return pool_PX.new_empty(*address_A.shape, *slot_shape)
