"""The figures of a report: plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvpress.report.reads import ReadFigures
from kvpress.report.tiers import TierFigures


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
    bytes_tiers: dict[str, int] = field(default_factory=dict)  # of bytes_held, where there are some
    reads: ReadFigures | None = None  # of decode steps, where they read some pages only


@dataclass(frozen=True)
class RankBytes:
    """What one of the processes holds that hold a model together."""

    held: int
    full: int
    peak: int


@dataclass(frozen=True)
class Figures:
    """What `kvpress.report.Report` says, without how it is shown."""

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
    bytes_states: int = 0  # of linear attention and convolutions, which no policy compresses
    tiers: TierFigures | None = None
    ranks: list[RankBytes] = field(default_factory=list)  # of all processes, where there are others

    @property
    def slots_kept(self) -> list[list[list[int]]]:
        """Slots per layer, sequence and KV head."""
        return [layer.slots_kept for layer in self.layers]

    @property
    def own_bytes(self) -> RankBytes:
        """What this process holds."""
        return RankBytes(self.bytes_held, self.bytes_full, self.bytes_peak)

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
        plain = asdict(self) | {"slots_kept": self.slots_kept, "fraction": self.fraction}
        if not self.ranks:
            del plain["ranks"]
        if not self.bytes_states:
            del plain["bytes_states"]
        if self.tiers is None:  # nothing is said of what is not there
            del plain["tiers"]
            for layer in plain["layers"]:
                del layer["bytes_tiers"]
        for layer in plain["layers"]:
            if layer["reads"] is None:
                del layer["reads"]
        return plain
