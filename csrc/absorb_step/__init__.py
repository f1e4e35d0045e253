"""One eviction per row while decoding, merged into the kept slot with the nearest key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.formulas.merging import Merging
from kvpress.ops.operands import Bounds, Columns, Pages, Turning, schema


class Operands(NamedTuple):
    """What a layer stores and may keep, and how evicted slots are merged into kept ones.

    threshold_B: fp32. width: the channels of keys that are compared and merged.
    """

    pages: Pages
    columns: Columns
    bounds: Bounds
    threshold_B: Tensor
    turning: Turning
    width: int
    merging: Merging


WRITES = ("key_PDS", "value_PSE", "counts_R", "position_PS", "mass_PS", "threshold_B")
SCHEMA = schema("absorb_step", Operands, "()", writes=WRITES)


def fake(operands: Operands) -> None:
    """Nothing is returned."""
