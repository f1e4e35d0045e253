"""Decoding after a long prompt: policies beside transformers' own cache, in one run.

The prompt is read once per candidate and its cache repeated over the batch. Byte arithmetic is the
ratio that there would be if only bytes counted: weights and cache of the one by those of the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.bench.timing import Samples, interleave
from rich.table import Table
from transformers import DynamicCache

import kvpress

BASELINE = "transformers"  # its DynamicCache with SDPA
FULL = "full"  # the engine without compression


@dataclass(frozen=True)
class DecodeRow:
    """One candidate: seconds of a decode step of the batch, and the bytes that it must read."""

    candidate: str
    batch: int
    prompt_tokens: int
    step: Samples
    bytes_cache: int
    bytes_weights: int

    @property
    def bytes_read(self) -> int:
        """Weights and cache, each once."""
        return self.bytes_cache + self.bytes_weights

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "candidate": self.candidate,
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "median_seconds": self.step.median,
            "low_seconds": self.step.low,
            "high_seconds": self.step.high,
            "bytes_cache": self.bytes_cache,
            "bytes_weights": self.bytes_weights,
        }


def measure(
    model: Any,
    ids: torch.Tensor,
    policies: Sequence[str],
    batch: int,
    rounds: int,
    warmup: int,
    cache_dtype: torch.dtype | None = None,
) -> list[DecodeRow]:
    """One row per candidate; a round decodes one token with each. `ids` is one prompt, `[1, P]`."""
    steps: dict[str, Callable[[int], None]] = {}
    caches: dict[str, Any] = {}
    token = ids[:, -1:].repeat(batch, 1)
    with torch.inference_mode():
        for name in (BASELINE, *policies):
            own, cache = _prefill(model, ids, name, cache_dtype, rounds + warmup)
            cache.batch_repeat_interleave(batch)
            caches[name], steps[name] = cache, _step(own, token, cache)
        synchronize = torch.cuda.synchronize if ids.is_cuda else None
        samples = interleave(steps, rounds, warmup, synchronize=synchronize)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return [
        DecodeRow(name, batch, ids.shape[1], samples[name], _held(cache), weights)
        for name, cache in caches.items()
    ]


def table(rows: Sequence[DecodeRow]) -> Table:
    """One line per candidate: time, and speed-ups beside what byte arithmetic allows."""
    made = Table(title="Time of one decode step; speed-up (allowed by bytes)", title_justify="left")
    for title in (
        "batch",
        "candidate",
        "ms",
        "low–high",
        "cache MiB",
        "vs transformers",
        "vs full",
    ):
        made.add_column(title, justify="left" if title == "candidate" else "right")
    by_name = {(row.batch, row.candidate): row for row in rows}
    for row in rows:
        base, full = by_name[row.batch, BASELINE], by_name.get((row.batch, FULL))
        ideal = full.bytes_read / row.bytes_read if full else 0.0
        made.add_row(
            str(row.batch),
            row.candidate,
            f"{row.step.median * 1e3:.1f}",
            f"{row.step.low * 1e3:.1f}–{row.step.high * 1e3:.1f}",
            f"{row.bytes_cache / 2**20:.0f}",
            f"{base.step.median / row.step.median:.2f}×",
            f"{full.step.median / row.step.median:.2f}× ({ideal:.2f}×)" if full else "–",
        )
    return made


def _prefill(
    model: Any, ids: torch.Tensor, name: str, cache_dtype: torch.dtype | None, steps: int
) -> tuple[Any, Any]:
    """A model of its own with the same weights, and its cache after the prompt."""
    own = type(model)(copy.deepcopy(model.config)).eval()
    own.load_state_dict(model.state_dict(), assign=True)
    own.tie_weights()
    if name == BASELINE:
        own.set_attn_implementation("sdpa")
        cache: Any = DynamicCache(config=own.config)
    else:
        cache = kvpress.attach(own, name, cache_dtype=cache_dtype).new_cache(steps)
    own(ids, past_key_values=cache, logits_to_keep=1)
    return own, cache


def _step(own: Any, token: torch.Tensor, cache: Any) -> Callable[[int], None]:
    return lambda _: own(token, past_key_values=cache)


def _held(cache: Any) -> int:
    if isinstance(cache, DynamicCache):
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return int(cache.report().bytes_held)
