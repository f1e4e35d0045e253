"""What all cells of a run have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from kvpress.bench.common.models import Source
from kvpress.bench.common.text import default_text


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model, dtypes by name, and how often is timed. new_tokens: of whole generations.

    threads: CPU threads. cap: bytes, for the largest batch and context. quality: the tasks that
    rows also have, and the contexts of each. device_map, revision, trust_remote_code: those of the
    `Source`, and tp. caps: of tiers, as `attach` takes them. text: what prompts are parts of, by
    name and hash.
    """

    model: str
    dtype: str = "float32"
    storage: str | None = None
    device: str = "cpu"
    threads: int = 1
    rounds: int = 9
    warmup: int = 2
    new_tokens: int = 32
    cap: int | None = None
    quality: list[str | int] | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    caps: dict[str, Any] | None = None
    tp: int | None = None
    text: dict[str, str] = field(default_factory=lambda: default_text().to_dict())

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The dtype of stored keys and values, where it is not the model's."""
        return None if self.storage is None else getattr(torch, self.storage)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; of loading only what was asked for."""
        plain = asdict(self)
        if not self.caps:
            del plain["caps"]  # rows that were measured before there were any stay comparable
        for name in ("device_map", "revision", "trust_remote_code", "tp"):
            del plain[name]
        return {**plain, **self.source.load_options}

    @property
    def source(self) -> Source:
        """Where the model comes from."""
        device = None if self.device_map or self.tp else self.device
        others = self.device_map, self.revision, self.trust_remote_code, self.tp
        return Source(self.model, self.dtype, device, *others)
