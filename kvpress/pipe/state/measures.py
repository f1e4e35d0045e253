"""What policies, budgets and formats must know of a layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Bounds
from kvpress.ops.operands import new
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.budget import Geometry
from kvpress.policy.slots import Step
from kvpress.store.base import KEY


def step(layer: Layer, sequence: int, new_tokens: int) -> Step:
    """Where a sequence is when a policy is asked what it needs."""
    decoded = layer.sequences.decoded.of(sequence)
    return Step(layer.kind.index, decoded, new_tokens, layer.context.horizon)


def first_query(layer: Layer, tokens: Tokens) -> int:
    """The number in the model of the first query head here."""
    first = layer.kind.first
    return first and first * (tokens.query_bNQD.shape[1] // layer.kind.heads)


def bounds_of(layer: Layer) -> Bounds:
    """Which slots stay, where the operators are."""
    own, rows = layer.sequences, layer.rows
    rank = layer.recipe.rank or "position"
    if rows.on_host:
        return new(Bounds, (own.seen_B, own.quota_R, own.recent_R, own.sink_B, rank))
    seen_B, quota_R, recent_R = (x.to(rows.device) for x in (own.seen_B, own.quota_R, own.recent_R))
    return Bounds(seen_B, quota_R, recent_R, own.sink_B, rank)


def calibrated(layer: Layer) -> Mapping[str, Tensor]:
    """What scores must know of a layer beforehand."""
    return layer.context.calibrated_at(layer.recipe.stage("score"), layer.kind)


def gram(layer: Layer) -> Tensor | None:
    """WᵀW of the output projection, where scores or selections must know it."""
    return layer.context.grams[layer.kind.index] if layer.context.grams else None


def geometry(layer: Layer) -> Geometry:
    """What a budget in bytes must know of a layer."""
    return Geometry(
        layers=layer.context.compressed,
        heads=layer.kind.of_all,
        page_slots=layer.rows.page_slots,
        page_bytes=layer.rows.paging.page_bytes(),
        row_bytes=layer.rows.memory.row_bytes(),
        headroom=layer.stores.headroom,
    )


def layouts(layer: Layer, kept: tuple[int, int]) -> list[PageLayout]:
    """The layouts of old pages that keep so many channels of keys and values."""
    widths = (layer.key_width, layer.value_width)
    item_bytes = layer.rows.columns[KEY].dtype.itemsize
    return layer.stores.layouts(widths, kept, item_bytes)
