"""Decode steps of one layer with very many tokens under caps, beside the same without tiers.

See `sparse.tiled` for what it is filled with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import torch
from kvpress.bench.common.journal import Row
from kvpress.bench.common.timing import Samples, interleave
from kvpress.bench.sparse.tiled import Shape, Tiles, fill, layer_of, step
from kvpress.bench.tiers.steps import CAPPED, RESIDENT, UNTIERED
from torch import Tensor

from kvpress.pipe.state import tier_ledger
from kvpress.pipe.state.layer import Layer
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.tiers import Tiers

_ROOM = 3.0  # of the bytes of a cache, so that it stays on the device; the rest is not touched


def measure(
    shape: Shape,
    made: Tiles,
    caps: Mapping[str, Any],
    steps: int,
    warmup: int,
    compare: bool,
    on_chunk: Callable[[int], None],
) -> dict[str, Row]:
    """A row per candidate. compare: also without tiers, and with all on the device."""
    device = int(_ROOM * shape.whole)
    every: dict[str, Mapping[str, Any] | None] = {CAPPED: caps}
    if compare:
        resident = {"device": device, "host": None, "disk": None}
        every = {UNTIERED: None, RESIDENT: resident, **every}
    layers, rows = {}, {}
    for name, own in every.items():
        tiers = None if own is None else _tiers(own)
        layers[name], begun = layer_of(shape, tiers), perf_counter()
        fill(layers[name], made, shape.tokens, on_chunk)
        rows[name] = {"fill_seconds": perf_counter() - begun, "error": None}
    out: dict[str, list[Tensor]] = {name: [] for name in every}

    def decode(name: str, number: int) -> None:
        at = shape.tokens + number
        out[name].append(step(layers[name], made.tokens(at, at + 1)))

    samples = interleave({name: partial(decode, name) for name in every}, steps, warmup)
    for name, layer in layers.items():
        rows[name] |= _row(layer, samples[name])
        for other, key in ((UNTIERED, "error_of_outputs"), (RESIDENT, "same_bits")):
            if other in out:
                rows[name][key] = _compared(out[name], out[other], exact=other == RESIDENT)
    for layer in layers.values():
        if layer.context.tiers is not None:
            layer.context.tiers.close()
    return rows


def _tiers(own: Mapping[str, Any]) -> Tiers:
    caps = Caps.parse(own["device"], own["host"], own["disk"])
    assert caps is not None, "device is given"
    return Tiers(caps, "one layer of tiled keys")


def _row(layer: Layer, taken: Samples) -> Row:
    tiers = layer.context.tiers
    own = None if tiers is None else asdict(tier_ledger.figures([layer], tiers, 0.0))
    return {"seconds": taken.to_dict(), "bytes_held": layer.bytes_held, "tiers": own}


def _compared(ours: list[Tensor], theirs: list[Tensor], exact: bool) -> float | bool:
    """Whether outputs are the same to the last bit, or Σ|o − o'| / Σ|o|."""
    ours_X, theirs_X = (torch.cat([x.flatten().float() for x in y]) for y in (ours, theirs))
    if exact:
        return torch.equal(ours_X, theirs_X)
    return float((ours_X - theirs_X).abs().sum() / theirs_X.abs().sum())
