"""Slots written into pages."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """A pool `[P, S, ...]`, or `[P, D, S]` with slot_last; addresses are page · S + slot."""

    pool_PX: Tensor
    address_A: Tensor
    slots_AX: Tensor
    slot_last: bool = False


SCHEMA = schema("scatter_slots", Operands, "()", writes=("pool_PX",))


def fake(operands: Operands) -> None:
    """Nothing is returned."""
