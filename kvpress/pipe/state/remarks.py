"""What a report says about the rows of a cache, besides what happened to prompts."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.pipe.state.layer import Layer
from kvpress.report.figures import LayerReport

_MUCH = 1.1  # of the bytes of an uncompressed cache


def remarks(states: Sequence[Layer], layers: Sequence[LayerReport]) -> list[str]:
    """Sentences about rows that are kept wide, and about pages that short texts leave empty."""
    return [*_wide(states), *_pages(states, layers)]


def _wide(states: Sequence[Layer]) -> list[str]:
    wide = sum(state.wide_rows for state in states)
    rows = sum(len(state.quota_R) for state in states)
    return (
        [f"{wide} of {rows} rows keep old slots in 8 bits: see the option guard."] if wide else []
    )


def _pages(states: Sequence[Layer], layers: Sequence[LayerReport]) -> list[str]:
    stores = [state.store for state in states if state.store is not None]
    held, full = (sum(x) for x in zip(*((r.bytes_held, r.bytes_full) for r in layers), strict=True))
    room = sum(store.room for store in stores)
    used = sum(int(store.counts.sum()) for store in stores)
    if held <= _MUCH * full or room <= _MUCH * used:
        return []
    return [
        f"Rows are held in whole pages of {stores[0].page_slots} slots, and {used / room:.0%} of"
        f" these hold a token: so short a text takes {held / max(full, 1):.0%} of the bytes of an"
        " uncompressed cache. Longer ones fill their pages; page_size of attach() makes them"
        " smaller."
    ]
