"""What decode steps read of a cache, and what they may have missed, summed over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvpress.hf.cache import EngineCache
from kvpress.report import LayerReport, Report
from kvpress.store.moves import Moves


class StepReads(NamedTuple):
    """Decode steps of a policy that reads some pages only.

    steps: how many. tokens_read: of a row per step, on average over the layers that choose.
    bytes_read: per step of all sequences, of all layers; of a layer that reads everything what it
    holds. missed_mean, missed_max: the share of its attention that a query head may have missed at
    the most, on average and of any; None: not certified.
    """

    steps: int
    tokens_read: float
    bytes_read: int
    missed_mean: float | None
    missed_max: float | None


def sum_of(held: Report, reports: Sequence[Report]) -> StepReads | None:
    """What the steps of one or more caches read; None: everything.

    held: the report by which layers are counted that read everything.
    """
    layers = [x for report in reports for x in report.layers if x.reads is not None]
    if not layers:
        return None
    own = [x.reads for x in layers if x.reads is not None]
    choosing = {layer.index for layer in layers}
    steps = sum(map(_passes, layers)) // len(choosing)
    others = sum(x.bytes_held for x in held.layers if x.index not in choosing)
    rows, read = sum(x.steps for x in own), sum(x.bytes_read for x in own)
    tokens = sum(x.tokens_read * x.steps for x in own) / rows
    certified = [x for x in own if x.missed_mean is not None and x.missed_max is not None]
    missed = sum((x.missed_mean or 0.0) * x.steps for x in certified) / rows
    most = max((x.missed_max or 0.0 for x in certified), default=0.0)
    return StepReads(
        steps,
        round(tokens, 1),
        round(read / steps) + others,
        round(missed, 9) if certified else None,
        round(most, 9) if certified else None,
    )


def reads_of(cache: Any) -> dict[str, Any] | None:
    """What the steps of a cache read, as plain values; None: everything, or nobody knows."""
    if not isinstance(cache, EngineCache):
        return None
    report = cache.report()
    reads = sum_of(report, [report])
    return None if reads is None else reads._asdict()


def moves_of(cache: Any) -> Moves:
    """Pages that the steps of a cache chose again and had to load, summed over its layers."""
    if not isinstance(cache, EngineCache):
        return Moves()
    found = [layer.reads for layer in cache.report().layers if layer.reads is not None]
    return Moves(*(sum(getattr(x, name) for x in found) for name in Moves._fields))


def _passes(layer: LayerReport) -> int:
    """Decode steps of the whole batch; those of a part of it count as a part."""
    rows = sum(len(slots) for slots in layer.slots_kept)
    return layer.reads.steps // max(1, rows) if layer.reads else 0
