"""What a run of `kvpress bench tiers` has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvpress.bench.common.caps import resolved
from kvpress.bench.common.models import Source
from kvpress.bench.common.text import default_text

LEAST_DISK = 1.5  # of what does not fit above it: records have headers, and free runs have edges


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model, prompts, caps and how often is timed.

    caps: as they were given, sizes or shares of the cache; disk: without its folder; None: what is
    left. steps: that are timed. memory_steps: of the process that measures memory.
    """

    source: Source
    policies: tuple[str, ...]
    tokens: int
    batch: int
    caps: Mapping[str, str | None]
    folder: str
    steps: int
    warmup: int
    memory_steps: int
    threads: int
    text: dict[str, str] = field(default_factory=lambda: default_text().to_dict())

    def sizes(self, whole: int) -> dict[str, Any]:
        """The caps that `attach` takes, for a cache of so many bytes. Raises TierError."""
        above = resolved({name: self.caps[name] for name in ("device", "host")}, whole)
        size = self.caps["disk"]
        if size is None:
            size = f"{int(LEAST_DISK * whole)}B"
        return {**above, **resolved({"disk": f"{size}:{self.folder}"}, whole)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without the folder, which is of one machine."""
        apart = ("source", "folder", "policies")
        plain = {k: v for k, v in asdict(self).items() if k not in apart}
        own = {"model": self.source.name, "dtype": self.source.dtype_name}
        own["policy"] = " and ".join(self.policies)
        return {**own, **self.source.load_options, **plain}


def synchronizer(device: torch.device) -> Any:
    """What waits for a device; None where nothing must be waited for."""
    return torch.cuda.synchronize if device.type == "cuda" else None


def folder_of(disk: str | None) -> tuple[str | None, Path | None]:
    """Size and folder of `0.6:folder` or `:folder`; None for what is not said."""
    if disk is None:
        return None, None
    size, _, folder = disk.partition(":")
    return size.strip() or None, Path(folder.strip()).expanduser() if folder.strip() else None
