"""What a report says of the tiers of a cache, gathered from the store."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.pipe.state.layer import Layer
from kvpress.report.tiers import TierFigures, Way
from kvpress.store.streamed import StreamedMemory
from kvpress.store.tiers.counters import Counters, Flow, Uses
from kvpress.store.tiers.tiers import TIERS, Tiers

Bytes = dict[str, int]


def pages(layer: Layer) -> Bytes:
    """Bytes of the pages of a layer in each tier; none where they do not move."""
    memory = None if layer.store is None else layer.store.memory
    return memory.tier_bytes() if isinstance(memory, StreamedMemory) else dict.fromkeys(TIERS, 0)


def held(layer: Layer) -> Bytes:
    """Bytes of a layer in each tier; what is beside pages is on the device."""
    below = pages(layer) | {"device": 0}
    return below | {"device": layer.bytes_held - sum(below.values())}


def figures(layers: Sequence[Layer], tiers: Tiers, prompt: float) -> TierFigures:
    """All of it. prompt: seconds that the prompts of the cache took; 0: not known."""
    vault, caps = tiers.vault, tiers.caps
    counters = Counters() if vault is None else vault.counters
    on_device, aside = tiers.device_bytes
    mine = _sum([pages(layer) for layer in layers])
    readers = 1 if vault is None else max(1, vault.workers)
    return TierFigures(
        held=_sum([held(layer) for layer in layers]),
        pages=mine,
        caps=_named(caps.device, caps.host, caps.disk.bytes if caps.disk else 0),
        used=_named(on_device, vault.bytes_host if vault else 0, vault.bytes_disk if vault else 0),
        aside=_named(aside, vault.bytes_bounce if vault else 0, 0),
        ways={
            "device to host": _way(counters.to_host),
            "host to disk": _way(counters.to_disk),
            "disk to host": _way(counters.from_disk),
            "host to device": _way(tiers.uses.to_device),
        },
        hits=_named(tiers.uses.device, tiers.uses.host, tiers.uses.disk),
        stalls=tiers.stalls.seconds,
        verified=counters.verified,
        rereads=counters.rereads,
        failures=counters.failures,
        timeouts=counters.timeouts,
        integrity_failures=counters.integrity_failures,
        direct=counters.direct if caps.disk else None,
        reading=_reading(mine, counters, tiers.uses, readers),
        prompt=prompt,
    )


def _reading(mine: Bytes, counters: Counters, uses: Uses, readers: int) -> float | None:
    """Seconds that reading the pages of lower tiers once takes, at the rates so far; None: unknown.

    Pages of the disk are read by several threads at once and then copied, those of the host only
    copied; that copies and reads overlap is left out.
    """
    seconds = 0.0
    flows = (
        (counters.from_disk, mine["disk"], readers),
        (
            uses.to_device,
            mine["host"] + mine["disk"],
            1,
        ),
    )
    for flow, size, threads in flows:
        if size and not flow.bytes:
            return None
        seconds += size / threads * flow.seconds / max(1, flow.bytes)
    return seconds


def _way(flow: Flow) -> Way:
    return Way(flow.bytes, flow.seconds, flow.count)


def _named(*values: int) -> Bytes:
    return dict(zip(TIERS, values, strict=True))


def _sum(parts: Sequence[Bytes]) -> Bytes:
    return {name: sum(part[name] for part in parts) for name in TIERS}
