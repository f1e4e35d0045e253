"""Decoding after a long prompt: policies beside transformers' own cache, in one run.

The prompt is read once per candidate and its cache repeated over the batch. Byte arithmetic is the
ratio that there would be if only bytes counted: weights and cache of the one by those of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.bench.candidates import BASELINE, FULL, Candidate, candidate, held
from kvpress.bench.timing import Samples, interleave
from rich.table import Table

POLICIES = ("full", "keyformer:budget=0.5", "keyformer:budget=0.2")


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
    steps: dict[str, Callable[[int], torch.Tensor]] = {}
    caches: dict[str, Any] = {}
    token = ids[:, -1:].repeat(batch, 1)
    with torch.inference_mode():
        for name in (BASELINE, *policies):
            rival = candidate(model, name, cache_dtype, rounds + warmup)
            cache = rival.new_cache()
            rival.forward(ids, cache)
            cache.batch_repeat_interleave(batch)
            caches[name], steps[name] = cache, _step(rival, token, cache)
        synchronize = torch.cuda.synchronize if ids.is_cuda else None
        samples = interleave(steps, rounds, warmup, synchronize=synchronize)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return [
        DecodeRow(name, batch, ids.shape[1], samples[name], held(cache), weights)
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


def _step(rival: Candidate, token: torch.Tensor, cache: Any) -> Callable[[int], torch.Tensor]:
    return lambda _: rival.forward(token, cache)
