"""Which positions a cache still holds, found by its keys: run in the peer's process.

Presses keep no positions: some gather the cache, others leave it and name keys to be masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Masked = tuple[Tensor, Tensor, Tensor]  # sequences, KV heads and slots of masked keys


class NotingCache(DynamicCache):
    """A cache that also keeps the keys of its first pass, before anything is evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, Tensor] = {}  # by layer, `[B, H, S, D]`

    def update(self, *given: Any, **named: Any) -> Any:
        """Appends keys and values of a layer, and returns all, as its base does."""
        stored = super().update(*given, **named)
        layer = named["layer_idx"] if "layer_idx" in named else given[2]
        self.first.setdefault(layer, stored[0].clone())
        return stored


def positions(first_HSD: Tensor, kept_HSD: Tensor, masked: Masked | None = None) -> list[list[int]]:
    """The sorted positions of one sequence that each KV head holds.

    first_HSD: keys of all positions, which are all different. kept_HSD: those that are stored now,
    in any order. masked: which of these are stored, but masked. Raises ValueError for a key that is
    not, or more than once, among the first ones.
    """
    hidden = [set[int]() for _ in kept_HSD]
    if masked is not None:
        _, heads, slots = (x.tolist() for x in masked)
        for head, slot in zip(heads, slots, strict=True):
            hidden[head].add(slot)
    return [
        _held(_keys(first_SD), _keys(kept_SD), gone)
        for first_SD, kept_SD, gone in zip(first_HSD, kept_HSD, hidden, strict=True)
    ]


def _held(first: Sequence[bytes], kept: Sequence[bytes], gone: set[int]) -> list[int]:
    """The positions of one row."""
    place = {key: position for position, key in enumerate(first)}
    if len(place) < len(first) or not place.keys() >= set(kept):
        raise ValueError("The keys of a cache do not say which positions it holds.")
    return sorted(place[key] for slot, key in enumerate(kept) if slot not in gone)


def _keys(key_SD: Tensor) -> list[bytes]:
    return [bytes(row) for row in key_SD.contiguous().view(torch.uint8).cpu().numpy()]
