"""Caches that are written to files or put aside on the host, and taken back: methods of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from kvpress.hf import cache_file
from kvpress.hf.cache_file import Devices as Devices
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.snapshot import restore as restored
from kvpress.store.sealed import Contents

_ASIDE = "what was put aside"  # in the place of a file's name


def save(self: Any, path: str | Path) -> None:
    """Writes the cache to a safetensors file, whole or not at all.

    `engine.load_cache` reads it; pages of tiers go to a second file, `path.ID.pages`. It names the
    model as it is: save before weights change. Tokens that could still be taken back become final.
    Raises CacheError if a forward pass was interrupted, the engine is gone or weights show no
    bytes, CacheFileError if a file cannot be written, TierError if one cannot be read.
    """
    held, settings = _held(self)
    facts = {**self.spec.facts(), "settings": settings}
    cache_file.save(path, *held, facts, self.spec.tiers, self.spec.ranks)


def load(self: Any, path: str | Path, devices: Devices, lazy: bool = False) -> None:
    """Becomes what another cache was when it was saved; see `engine.load_cache`.

    devices: where layers are. Raises CacheFileError, TierError; nothing changes then.
    """
    found = cache_file.load(path, self.spec, self.context, devices, lazy)
    self.take_over(found, devices, path)


def contents(self: Any) -> Contents:
    """Everything that a cache without tiers holds, on the host, for a while.

    Raises CacheError if a forward pass was interrupted.
    """
    held, settings = _held(self)
    return cache_file.contents(*held, settings)


def restore(self: Any, contents: Contents, devices: Devices) -> None:
    """Becomes what another cache was, by its `contents`, which are used up."""
    kinds = self.spec.fingerprint.kinds
    self.take_over(restored(_ASIDE, contents, kinds, self.context, devices), devices, _ASIDE)


def _held(cache: Any) -> tuple[tuple[list[Layer], SeenIds, dict[str, Tensor]], dict[str, Any]]:
    """Layers, ids and states of a whole cache, and its settings."""
    cache.check_whole()
    cache.beside.settle()
    settings = cache_file.settings(cache.context, cache.horizon, cache.ids.ended)
    return (cache.states, cache.ids, cache.beside.tensors()), settings
