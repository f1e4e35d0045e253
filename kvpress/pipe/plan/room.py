"""What tiers need on the device, and what lower ones can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvpress.formulas.page_layout import PageLayout
from kvpress.formulas.sizes import round_up
from kvpress.pipe.plan.demand import Shape
from kvpress.pipe.plan.held import Bytes
from kvpress.pipe.plan.plan import Memory
from kvpress.pipe.state.stores import Stores
from kvpress.policy.recipe import Recipe
from kvpress.store.spans import span_pages
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.record import header_bytes
from kvpress.store.units import unit_bytes
from kvpress.types import LayerKind

_BOUNCE = 64 << 20  # bytes of the host that reads and writes of a disk pass through, at most
_ON_WAY, _PART = 32 << 20, 8  # what is on its way: at most so much, and an eighth of the device
_POSITION = 4  # bytes of a position in a record
_MORE = 64  # this part of the device is made free beyond what is needed


class Floor(NamedTuple):
    """What tiers must have room for. unit: the most bytes that any layer reads at once.

    spans: of all heads of a sequence in each layer, while they are open. record: of the largest
    record, in which such a span goes to the host and the disk.
    """

    unit: int
    spans: list[int]
    record: int

    @property
    def on_way(self) -> int:
        """Bytes of pages on their way."""
        return 2 * self.unit

    def lacks(self, host: int, disk: int) -> str:
        """Why tiers of so many bytes cannot take a record; "" where they can. 0: there is none."""
        if disk and 2 * self.record > _BOUNCE:
            return (
                f"disk=: records have up to {self.record} bytes, and two of them do not fit into"
                f" the {_BOUNCE} bytes of the host that they pass through. Leave disk= out"
            )
        least = self.record * (4 if disk else 1)  # half of a host is passed through, by two
        if not 0 < host < least:
            return ""
        four = f", four of which must fit where there is a disk: {least}" if disk else ""
        return (
            f"host={host} bytes are too few: pages go there in records of up to {self.record}"
            f" bytes{four}. Give at least host={least}, or leave host= out"
        )

    def opened(self, sequences: int = 1) -> int:
        """Open spans and recent slots of so many sequences.

        Those of a prompt may be two: one that is complete goes down only once the next has begun.
        """
        return 2 * sum(self.spans) * sequences + max(self.spans)


def floor(recipe: Recipe, kinds: Sequence[LayerKind], dtype: torch.dtype) -> Floor:
    """The floor of the layers whose pages may be in any tier; values are as wide as keys."""
    units, spans, records = [], [], []
    for kind in kinds:
        rule = recipe.stage("retrieve").retrieve(kind.index)
        stores = Stores(recipe, recipe.limits, 0, dtype, kind.index, retrieval=rule)
        widths = (kind.width or 1, kind.width or 1)
        layouts = stores.layouts(widths, stores.kept(widths), dtype.itemsize)
        units.append(unit_bytes(kind.heads, layouts))
        spans.append(kind.heads * max(span_pages(x) * x.page_bytes for x in layouts))
        records.append(max(_record_bytes(kind.heads, x, stores) for x in layouts))
    return Floor(max(units), spans, max(records))


def _record_bytes(heads: int, layout: PageLayout, stores: Stores) -> int:
    """Bytes of a span of all heads as a record: pages, positions where they are kept, a header."""
    pages = heads * span_pages(layout)
    beside = 0 if stores.ordered else layout.slots * _POSITION
    slices = heads if stores.cells is None else pages  # each page can be read alone then
    return round_up(header_bytes(slices) + pages * (layout.page_bytes + beside), UNIT)


def device_bytes(shape: Shape, recipe: Recipe, batch: int, held: Bytes, below: int) -> int:
    """The least `device=` with which a cache fits whose lower tiers have room for `below` bytes."""
    least = floor(recipe, shape.tiered, shape.stored)
    here = max(0, held.pages - below)
    rest = held.beside + held.waiting + least.opened(batch) + here + here // _MORE
    on_way = min(_ON_WAY, rest // (_PART - 1))
    return rest + max(least.on_way, on_way)


class Below(NamedTuple):
    """Lower tiers. pages: bytes of pages that they can take. beside: bytes of `memory` for them."""

    pages: int
    beside: int


def lower_bytes(memory: Memory) -> Below:
    """What the host and the disk can take: not all, since records end at whole units.

    What goes to the disk passes through the host, and a third of a disk is for what is written
    while the place of another record is not free yet.
    """
    bounce = min(_BOUNCE, memory.host // 2) if memory.disk else 0
    pages = (memory.host - bounce) * 19 // 20 + memory.disk * 2 // 3
    return Below(pages, _BOUNCE if memory.disk and not memory.host else 0)
