"""What budgets and formats must know of a layer."""

from __future__ import annotations

from kvpress.formulas.page_layout import PageLayout
from kvpress.pipe.state.layer import Layer
from kvpress.policy import formats
from kvpress.policy.budget import Geometry
from kvpress.store.base import KEY


def geometry(layer: Layer) -> Geometry:
    """What a budget in bytes must know of a layer."""
    return Geometry(
        layers=layer.context.compressed,
        heads=layer.kind.heads,
        page_slots=layer.rows.page_slots,
        page_bytes=layer.rows.paging.page_bytes(),
        row_bytes=layer.rows.memory.row_bytes(),
        headroom=layer.stores.headroom,
    )


def layouts(layer: Layer, kept: tuple[int, int]) -> list[PageLayout]:
    """The layouts of old pages that keep so many channels of keys and values."""
    widths = (layer.key_width, layer.value_width)
    item_bytes = layer.rows.columns[KEY].dtype.itemsize
    return formats.layouts(layer.recipe.packing, widths, kept, item_bytes)
