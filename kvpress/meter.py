"""The ledger: bytes counted from the storages, slots kept, and the time of every stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from kvpress import report_table
from kvpress.tables import Fitted

STAGES = ("prefill attention", "observe", "select", "merge", "store", "format", "decode attention")


class Meter:
    """Seconds per stage of one cache. On a GPU events are recorded and read only when asked."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def stage(self, name: str, device: torch.device | None) -> AbstractContextManager[None]:
        """Adds the time of the block to a stage. device: where it runs, None for the host."""
        if device is not None and device.type == "cuda":
            return self._on_device(name)
        return _Stopwatch(self._seconds, name)

    @contextmanager
    def _on_device(self, name: str) -> Iterator[None]:
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far. Waits for the device."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


class _Stopwatch:
    """Adds the seconds of a block to an entry: a class, since it runs for every layer and token."""

    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start


@dataclass(frozen=True)
class LayerReport:
    """One layer of a report. Bytes are those of its storages."""

    index: int
    kind: str  # the name of its LayerKind
    slots_kept: list[list[int]]  # [sequence][KV head]
    bytes_held: int
    bytes_full: int
    bytes_shared: int = 0
    density: list[float] = field(default_factory=list)  # of prompt attention, per query head


@dataclass(frozen=True, repr=False)
class Report:
    """What a cache holds and what it cost. Printed, and shown by a notebook, as a table.

    tokens_seen: real tokens of each sequence, padding excluded. bytes_full: what an uncompressed
    cache of these tokens would hold, in the model's dtype, sliding layers at their window.
    bytes_held: the live storages of keys, values, positions, per-slot state and page tables.
    bytes_shared: the part of them that forks of this cache use as well. bytes_peak: the most that
    was held so far, in a prompt with the new keys and values of the layer at work. Prompt attention
    is computed in full unless a policy makes it sparse: a layer's density is then the share of
    blocks computed. bytes_ids: the ids of the tokens seen, 4 bytes each, by which a text that does
    not go on from the cache is refused; bytes_held are without them.
    """

    model: str
    policy: str
    tokens_seen: list[int]
    layers: list[LayerReport]
    bytes_held: int
    bytes_full: int
    stages: dict[str, float]
    notes: list[str] = field(default_factory=list)
    bytes_shared: int = 0
    bytes_peak: int = 0
    bytes_ids: int = 0

    @property
    def slots_kept(self) -> list[list[list[int]]]:
        """Slots per layer, sequence and KV head."""
        return [layer.slots_kept for layer in self.layers]

    @property
    def fraction(self) -> float:
        """Bytes held / bytes full."""
        return self.bytes_held / self.bytes_full if self.bytes_full else 1.0

    @property
    def attention(self) -> str:
        """A sentence on the attention of prompts."""
        if not any(layer.density for layer in self.layers):
            return "Prompt attention is exact; only what is stored is compressed."
        return f"{self.density:.0%} of the blocks of prompt attention were computed."

    @property
    def density(self) -> float:
        """The share of blocks of prompt attention that was computed, over layers and heads."""
        every = [share for layer in self.layers for share in layer.density or [1.0]]
        return sum(every) / max(1, len(every))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, ready for JSON."""
        return asdict(self) | {"slots_kept": self.slots_kept, "fraction": self.fraction}

    def __str__(self) -> str:
        return report_table.text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report_table.page(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Fitted(report_table.table(self))
        for remark in report_table.remarks(self):
            yield Text(remark)
