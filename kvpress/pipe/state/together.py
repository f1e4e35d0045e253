"""Rows of a layer that decide together, where other processes have some of them.

Whether to ask the others must not depend on rows that are here: whoever asks waits for all.
"""

from __future__ import annotations

from torch import Tensor

from kvpress.parallel import ALONE, Ranks
from kvpress.pipe.state.layer import Layer


def ranks(layer: Layer) -> Ranks:
    """The processes that have rows of this layer."""
    return layer.context.ranks if layer.kind.divided else ALONE


def of_all(layer: Layer, own: Tensor, fill: float = 0.0) -> Tensor:
    """A tensor `[B, H, ..., S]`, or of query heads, with the rows of all processes."""
    return ranks(layer).gather(own, 1, fill)


def evicts_together(layer: Layer) -> bool:
    """Whether evictions of rows depend on each other: what is merged does, and joint scores."""
    stages = (layer.recipe.stage(name) for name in ("score", "select"))
    joint = layer.recipe.merging is not None or any(stage.joins_heads for stage in stages)
    return joint and not ranks(layer).alone


def selects_together(layer: Layer) -> bool:
    """Whether what stays of a prompt's rows does."""
    shared = layer.recipe.pool is not None or layer.recipe.shares
    return evicts_together(layer) or (shared and not ranks(layer).alone)


def evicting(layer: Layer, found: bool) -> bool:
    """Whether rows are to be evicted from, here or, where that matters, in any process."""
    return ranks(layer).any(found) if evicts_together(layer) else found


def selecting(layer: Layer, found: bool) -> bool:
    """The same of a prompt that was read."""
    return ranks(layer).any(found) if selects_together(layer) else found
