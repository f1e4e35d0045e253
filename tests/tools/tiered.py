"""Engines with tiers: how small a device may be, where pages can be, and what is computed then."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from tiers import LateCopies
from torch import Tensor

import kvpress
from kvpress.engine import Engine
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.tiers import Tiers

ALL = {"device": "64MiB"}
LOWER = ("host", "disk", "both")


def model(
    query_heads: int = 4,
    kv_heads: int = 2,
    width: int = 32,
    dtype: Any = torch.float32,
    **more: Any,
) -> Any:
    """A llama of three layers whose next token depends on what it attends to."""
    shape = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": width, "hidden_size": 64}
    return helpers.sharp(more.pop("family", "llama"), **shape, **more).to(dtype)


def least(model: Any, recipe: str, sequences: int = 1) -> tuple[int, int]:
    """The smallest device, as the error says it, and the bytes of open spans of a sequence."""
    with pytest.raises(kvpress.TierError, match="at least device=") as raised:
        kvpress.attach(model, recipe, device=1)
    found = re.search(r"device=(\d+), and (\d+) more", str(raised.value))
    assert found is not None
    first, more = (int(n) for n in found.groups())
    return first + more * (sequences - 1), more


def caps(way: str, model: Any, recipe: str, sequences: int, folder: Path) -> dict[str, Any]:
    """Where pages may be: `all` on the device, or on a device that is as small as can be."""
    if way == "all":
        return ALL
    device, opened = least(model, recipe, sequences)
    disk = f"16MiB:{folder}"
    few = 4 * opened  # of the host: some records, and what passes through it
    return {
        "host": {"device": device, "host": "16MiB"},
        "disk": {"device": device, "disk": disk},
        "both": {"device": device, "host": few, "disk": disk},
    }[way]


@contextmanager
def attached(model: Any, recipe: str, caps: dict[str, Any]) -> Iterator[Engine]:
    """An engine whose folder is free again behind the block."""
    with kvpress.attach(model, recipe, **caps) as engine:
        try:
            yield engine
        finally:
            close(engine)


def close(engine: Engine) -> None:
    tiers = engine.spec.tiers
    if tiers is not None:
        tiers.close()


def below(cache: Any) -> int:
    """Bytes of pages that are not on the device."""
    held = [state.store.memory.tier_bytes() for state in cache.states if state.store.streams]
    return sum(tier["host"] + tier["disk"] for tier in held)


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, chunks: list[int], **more: Any) -> list[Tensor]:
    """Logits of every chunk of a prompt."""
    parts = ids.split(chunks, dim=1)
    return [model(part, past_key_values=cache, use_cache=True, **more).logits for part in parts]


@torch.no_grad()
def decode(model: Any, cache: Any, logits: Tensor, new: int) -> list[Tensor]:
    """Logits of greedy decoding behind other logits."""
    found = []
    for _ in range(new):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True).logits
        found.append(logits)
    return found


def tokens(logits: list[Tensor]) -> list[list[int]]:
    return [x[:, -1].argmax(-1).tolist() for x in logits]


def check(engine: Engine, *caches: Any) -> None:
    """Everything that is kept adds up."""
    assert all(cache.check_integrity() for cache in caches)
    tiers = engine.spec.tiers
    if tiers is None:
        return
    tiers.collect()
    if tiers.vault is not None:
        tiers.vault.check_integrity()
    for arena in tiers._arenas.values():
        assert 0 <= arena.used <= arena.size - 2 * arena.half
        on_device = 0
        for (device, page_bytes, _), shelf in tiers._shelves.items():
            if device == arena.device:
                on_device += int((shelf.directory.at_P != NOWHERE).sum()) * page_bytes
        assert on_device == arena.used


def used(tiers: Tiers) -> tuple[int, int, int]:
    """Bytes that pages take on the device, on the host and on the disk."""
    gc.collect()
    tiers.collect()
    device = sum(arena.used for arena in tiers._arenas.values())
    vault = tiers.vault
    return (device, vault.bytes_host, vault.bytes_disk) if vault else (device, 0, 0)


def nothing_stays_in_flight(tiers: Tiers) -> bool:
    """Whether what was read ahead, which nobody waits for, ends soon."""
    until = time.monotonic() + 10
    while tiers.vault is not None and tiers.vault.bytes_in_flight and time.monotonic() < until:
        time.sleep(0.005)
    return tiers.vault is None or tiers.vault.bytes_in_flight == 0


def threads() -> set[threading.Thread]:
    """The threads of tiers that run now."""
    return {t for t in threading.enumerate() if t.name.startswith("kvpress-tier")}


class ShuffledCopies(LateCopies):
    """Copies that end in any order, some time after they have begun."""

    def __init__(self) -> None:
        self._lock, self._begun, self._random = threading.Lock(), [], random.Random(0)

    def copy(self, target: Tensor, source: Tensor) -> _Shuffled:
        begun = _Shuffled(self, target, source)
        with self._lock:
            self._begun.append(begun)
        return begun

    def end(self, wanted: _Shuffled) -> None:
        time.sleep(self._random.random() / 2000)
        with self._lock:
            self._random.shuffle(self._begun)
            while not wanted.over:
                one = self._begun.pop()
                one.target.copy_(one.source)
                one.over = True


class _Shuffled:
    def __init__(self, engine: ShuffledCopies, target: Tensor, source: Tensor) -> None:
        self.engine, self.target, self.source, self.over = engine, target, source, False

    def wait(self) -> None:
        self.engine.end(self)
