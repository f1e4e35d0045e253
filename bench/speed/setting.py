"""What all cells of a run have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from kvpress.bench.models import DTYPES


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model, dtypes by name, and how often is timed. new_tokens: of whole generations.

    threads: CPU threads. cap: bytes, for the largest batch and context. quality: the tasks that
    rows also have, and the contexts of each.
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

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The dtype of stored keys and values, where it is not the model's."""
        return None if self.storage is None else DTYPES[self.storage]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
