"""What a store keeps of a slot, and what is handed to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KEY, VALUE, POSITION, MASS = "key", "value", "position", "mass"
PAGE = "page"  # the keys and values of a page of old slots
REF = "ref"  # the number by which tiers know such a page
BOX = "box"  # the least and the largest key of every channel of such a page
CELL = "cell"  # the part of the box that every key is in
LENGTH = "length"  # of the farthest corner of the box, and of the longest value
SPAN = "span"  # the first and the last position of such a page, when it was made


class Column(NamedTuple):
    """One field of every slot: `shape` is that of one slot's value.

    slot_last: pages are `[*shape, page_slots]`, so that a channel of neighbouring slots lies side
    by side, as kernels read keys; otherwise `[page_slots, *shape]`. volatile: every step writes it;
    one number per slot. whole: `shape` is that of a page. on_host: it lies there, whatever the
    device of the others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slot_last: bool = False
    volatile: bool = False
    whole: bool = False
    on_host: bool = False

    def page_shape(self, page_slots: int) -> tuple[int, ...]:
        """The shape of one page."""
        if self.whole:
            return self.shape
        return (*self.shape, page_slots) if self.slot_last else (page_slots, *self.shape)

    def page_bytes(self, page_slots: int) -> int:
        """Bytes of this field in one page."""
        return math.prod(self.page_shape(page_slots)) * self.dtype.itemsize


@dataclass(frozen=True)
class Survivors:
    """Slots to be stored, dense: row (b, h) holds its first `counts_BH[b, h]` slots."""

    sequences: tuple[int, ...]
    columns: Mapping[str, Tensor]  # each [b, H, K, ...]; b = len(sequences)
    counts_BH: Tensor  # int64, on the host
    evicted: bool = False  # whether some of the sequences' slots were dropped


def by_position(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense columns, each row in the order of its positions, empty slots first."""
    order_bHS = columns[POSITION].argsort(dim=-1, stable=True)
    ordered = {}
    for name, values in columns.items():
        index = order_bHS.view(*order_bHS.shape, *[1] * (values.dim() - 3))
        ordered[name] = values.gather(2, index.expand(*order_bHS.shape, *values.shape[3:]))
    return ordered
