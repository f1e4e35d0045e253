"""transformers and the engine as candidates, each with a model that shares the weights."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress.bench.common.storages import storage_bytes
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import StaticLayer

import kvpress
from kvpress import ops
from kvpress.errors import KVPressError
from kvpress.hf.cache import EngineCache
from kvpress.hf.generation import cache_name
from kvpress.policy.loading import parse
from kvpress.policy.recipe import Recipe

BASELINE = "transformers"  # its DynamicCache with SDPA
STATIC = "transformers-static"  # its StaticCache, which reserves all room and copies nothing
MALLOC = "transformers-malloc"  # DynamicCache in a process whose allocator keeps large blocks
RIVALS = (BASELINE, MALLOC, STATIC)
FULL = "full"  # the engine without compression
CACHES: dict[str, Callable[[Any], Any]] = {
    BASELINE: lambda config: DynamicCache(config=config),
    "transformers-offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "transformers-fp8": lambda config: QuantizedCache("fp8", config),
    "transformers-int4": lambda config: QuantizedCache("hqq", config, nbits=4),
    "transformers-int2": lambda config: QuantizedCache("hqq", config, nbits=2),
}


class CandidateError(KVPressError):
    """A candidate needs something that is not installed."""


@dataclass(frozen=True)
class Candidate:
    """A model, where its empty caches come from, and by which name it takes them."""

    model: Any
    new_cache: Callable[..., Any]
    cache_name: str
    tiers: Any = None  # of its engine, where pages may be elsewhere than on the device

    def forward(self, ids_BQ: torch.Tensor, cache: Any, keep: int = 1) -> torch.Tensor:
        """The logits `[B, keep, V]` after the last of some new tokens, which the cache takes."""
        out = self.model(ids_BQ, logits_to_keep=keep, **{self.cache_name: cache})
        logits: torch.Tensor = out.logits
        return logits

    def read(self, ids_bQ: torch.Tensor, copies: int) -> Any:
        """A cache of prompts that are repeated so often, each with storages of its own."""
        cache = self.new_cache()
        if isinstance(cache, StaticCache) and copies > 1:
            return self._repeated(ids_bQ, cache, copies)
        if isinstance(cache, QuantizedCache):  # asked to repeat itself, it does nothing
            self.forward(ids_bQ.repeat(copies, 1), cache)
            return cache
        self.forward(ids_bQ, cache)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        if isinstance(cache, EngineCache) and copies > 1:
            cache.unshare()  # as different prompts would be
        return cache

    def _repeated(self, ids_bQ: torch.Tensor, cache: Any, copies: int) -> Any:
        """The same of a cache that cannot be repeated, whose storages are made once."""
        if any(type(layer) is not StaticLayer for layer in cache.layers):
            self.forward(ids_bQ.repeat(copies, 1), cache)
            return cache
        one = self.new_cache()
        self.forward(ids_bQ, one)
        for layer, read in zip(cache.layers, one.layers, strict=True):
            states = (x[:, :, : ids_bQ.shape[1]] for x in (read.keys, read.values))
            layer.update(*(x.repeat_interleave(copies, 0) for x in states))
        return cache

    def bytes_held(self, cache: Any) -> int:
        """Bytes of storages; with tiers what the ledger says, whose arenas are mostly room."""
        return storage_bytes(cache) if self.tiers is None else cache.report().bytes_held

    def generate(self, ids_BQ: torch.Tensor, cache: Any, new_tokens: int) -> torch.Tensor:
        """Prompts and exactly so many new tokens, greedily: `[B, Q + new_tokens]`."""
        out: torch.Tensor = self.model.generate(
            ids_BQ,
            attention_mask=torch.ones_like(ids_BQ),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **{self.cache_name: cache},
        )
        return out


def candidate(
    model: Any,
    name: str | Recipe,
    cache_dtype: torch.dtype | None = None,
    new_tokens: int | None = None,
    caps: Mapping[str, Any] | None = None,
    room: int | None = None,
) -> Candidate:
    """A cache of transformers by its name, or the engine with the policy `name`.

    It is on a copy of the model that shares the weights and has its own config, which attaching
    changes. new_tokens: what schedules of a policy should expect. caps: of the engine's tiers, on
    disk in a folder of its own. room: tokens that a cache may come to hold, where it must know.
    Raises what `kvpress.attach` raises.
    """
    copied = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    if isinstance(name, str) and name in CACHES:
        copied.set_attn_implementation("sdpa")
        return Candidate(copied, partial(CACHES[name], copied.config), cache_name(copied))
    if name == STATIC:
        if room is None:
            raise CandidateError(f"{STATIC} reserves its room, which only the benchmarks name.")
        copied.set_attn_implementation("sdpa")
        static = partial(StaticCache, config=copied.config, max_cache_len=room)
        return Candidate(copied, static, cache_name(copied))
    with _folder_of_its_own(caps or {}) as given:
        engine = kvpress.attach(copied, name, cache_dtype=cache_dtype, **given)
    new_cache = partial(engine.new_cache, max_new_tokens=new_tokens)
    return Candidate(copied, new_cache, cache_name(copied), engine.spec.tiers)


@contextmanager
def _folder_of_its_own(caps: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Caps whose folder is a new one in the folder given: engines cannot share one."""
    given = dict(caps)
    if not given.get("disk"):
        yield given
        return
    size, _, folder = given["disk"].partition(":")
    with tempfile.TemporaryDirectory(dir=folder, prefix="kvpress-") as own:
        yield given | {"disk": f"{size}:{own}"}


def refuse_unknown(name: str) -> None:
    """Raises CandidateError or PolicyError before a model is loaded in vain."""
    if name not in CACHES:
        parse(name)
    elif name.startswith("transformers-int") and importlib.util.find_spec("hqq") is None:
        raise CandidateError(
            f"{name} needs the package hqq. Install it: scripts/install demo,peers."
        )


def weight_bytes(model: Any) -> int:
    """Bytes of the model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def warm_up(model: Any) -> None:
    """A short forward pass, so that the first measurement does not pay for lazy loading.

    Nor for compiling the operators, where they were never used before.
    """
    ops.backends()
    with torch.inference_mode():
        model(torch.ones(1, 64, dtype=torch.long, device=model.device), use_cache=False)
