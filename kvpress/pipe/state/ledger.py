"""What a report says of the layers of a cache: bytes, slots, and sentences about them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.pipe.state import tier_ledger
from kvpress.pipe.state.layer import Layer
from kvpress.policy.pooling import thins
from kvpress.report.figures import LayerReport
from kvpress.store.base import POSITION
from kvpress.types import EMPTY

_MUCH = 1.1  # of the bytes of an uncompressed cache


def report(layer: Layer) -> LayerReport:
    """The ledger of a layer."""
    if layer.store is None:
        return LayerReport(layer.kind.index, layer.kind.name, [], 0, 0)
    limit = torch.iinfo(torch.int64).max if layer.kind.window is None else layer.kind.window - 1
    apart = 0 if layer.kind.latent else layer.value_width  # transformers holds a latent once
    slot_bytes = (layer.key_width + apart) * layer.token_dtype.itemsize
    tokens = int(layer.sequences.seen_B.clamp_max(limit).sum())
    return LayerReport(
        index=layer.kind.index,
        kind=layer.kind.name,
        slots_kept=layer.store.counts_BH.tolist(),
        bytes_held=layer.bytes_held,
        bytes_full=tokens * layer.kind.heads * slot_bytes,
        bytes_shared=layer.store.memory.nbytes_shared,
        density=density(layer),
        bytes_tiers=tier_ledger.held(layer) if layer.context.tiers else {},
        reads=layer.reads.figures,
    )


def kept_positions(layer: Layer, sequence: int, head: int) -> list[int]:
    """The sorted logical positions of one row; padding has no position."""
    if layer.store is None:
        return []
    position_S = layer.store.dense(POSITION, [sequence])[0, head]
    return sorted(int(p) for p in position_S[position_S != EMPTY])


def count_blocks(layer: Layer, computed_BN: Tensor, causal: int) -> None:
    """Notes how many blocks of each head of a prompt were computed, of so many."""
    computed_N, all_ = layer.blocks or (0, 0)
    layer.blocks = computed_N + computed_BN.sum(0), all_ + len(computed_BN) * causal


def density(layer: Layer) -> list[float]:
    """The share of blocks that was computed, of every query head; empty: all were."""
    if layer.blocks is None:
        return []
    computed_N, all_ = layer.blocks
    shares: list[float] = (computed_N.double() / all_).tolist()
    return shares


def remarks(layers: Sequence[Layer], reports: Sequence[LayerReport]) -> list[str]:
    """Sentences about rows: unequal ones, those kept wide, pages that short texts leave empty."""
    return [*_uneven(layers), *_wide(layers), *_pages(layers, reports)]


def _uneven(layers: Sequence[Layer]) -> list[str]:
    own = [x for x in layers if x.store is not None and x.kind.window is None and x.recipe.uneven]
    counts = [n for layer in own for n in layer.rows.counts.tolist()]
    pool = own[0].recipe.pool if own else None
    if not counts or (min(counts) == max(counts) and not thins(pool)):
        return []
    mean = sum(counts) / len(counts)
    line = f"{len(counts)} rows keep {min(counts)} to {max(counts)} slots, {mean:.0f} on average."
    if pool is None or not thins(pool):
        return [line]
    return [
        line,
        f"Of prompts only tokens with scores above {pool.above:.3g} stay, and protected ones.",
    ]


def _wide(layers: Sequence[Layer]) -> list[str]:
    aging = [layer.store.aging for layer in layers if layer.store is not None]
    wide = sum(own.wide_rows for own in aging if own is not None)
    rows = sum(len(layer.sequences.quota_R) for layer in layers)
    return (
        [f"{wide} of {rows} rows keep old slots in 8 bits: see the option guard."] if wide else []
    )


def _pages(layers: Sequence[Layer], reports: Sequence[LayerReport]) -> list[str]:
    stores = [layer.store for layer in layers if layer.store is not None]
    held = sum(report.bytes_held for report in reports)
    full = sum(report.bytes_full for report in reports)
    room = sum(store.memory.room for store in stores)
    used = sum(int(store.counts.sum()) for store in stores)
    if held <= _MUCH * full or room <= _MUCH * used:
        return []
    return [
        f"Rows are held in whole pages of {stores[0].page_slots} slots, and {used / room:.0%} of"
        f" these hold a token: so short a text takes {held / max(full, 1):.0%} of the bytes of an"
        " uncompressed cache. Longer ones fill their pages; page_size of attach() makes them"
        " smaller."
    ]
