"""Caps of tiers: sizes, or shares of what the cache of a model would hold uncompressed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from kvpress.hf.support import check_model
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.folder import check_folder

_SHARE = re.compile(r"0?\.\d+|1(?:\.0*)?")


def resolved(given: Mapping[str, str | None], whole: int) -> dict[str, Any]:
    """What `attach` takes, of sizes and of shares of `whole` bytes: `0.2`, `0.6:folder`."""
    made: dict[str, Any] = {}
    for name, text in given.items():
        size, colon, folder = (text or "").partition(":")
        share = _SHARE.fullmatch(size.strip())
        size_bytes = int(Fraction(size.strip()) * whole) if share else 0
        shared = f"{size_bytes}B:{folder}" if colon else size_bytes
        made[name] = shared if share else text
    return made


def check(given: Mapping[str, str | None]) -> None:
    """Raises TierError for what cannot be caps, or no folder, whatever a cache will hold."""
    caps = Caps.parse(**resolved(given, 2**40))
    if caps is not None and caps.disk is not None:
        check_folder(caps.disk.folder)


def cache_bytes(model: Any, tokens: int, batch: int, dtype: torch.dtype | None = None) -> int:
    """Keys and values of so many tokens in the layers whose pages may be in any tier."""
    kinds = [kind for kind in check_model(model).kinds if kind.window is None]
    widths = sum(kind.heads * (kind.width or 0) for kind in kinds)
    return 2 * widths * tokens * batch * (dtype or model.dtype).itemsize
