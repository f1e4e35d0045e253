"""Decoding after a long prompt: policies beside transformers' own cache, in one run.

The prompt is read once per candidate and its cache repeated over the batch. Byte arithmetic is the
ratio that there would be if only bytes counted: weights and cache of the one by those of the other.
The linear layers, which are transformers' and PyTorch's, take longer than their bytes allow; what
is ours shows in the attention alone, which the engine's ledger times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from kvpress.bench.candidates import BASELINE, FULL, Candidate, candidate, held
from kvpress.bench.timing import Samples, interleave
from rich.table import Table

from kvpress.cache import EngineCache

POLICIES = ("full", "keyformer:budget=0.5", "keyformer:budget=0.2")


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One candidate: seconds of a decode step of the batch, and the bytes that it must read.

    attention: what appending, attending, observing and evicting take of the step, over all layers;
    None for transformers, which keeps no ledger.
    """

    candidate: str
    batch: int
    prompt_tokens: int
    step: Samples
    bytes_cache: int
    bytes_weights: int
    attention: Samples | None

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
            "attention_median_seconds": self.attention and self.attention.median,
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
            if isinstance(cache, EngineCache):
                cache.unshare()  # as different prompts would be
            caches[name], steps[name] = cache, _step(rival, token, cache)
        spent = {name: [_ledger(caches[name])] for name in policies}

        def read_ledgers(_: int) -> None:
            for name, seconds in spent.items():
                seconds.append(_ledger(caches[name]))

        synchronize = torch.cuda.synchronize if ids.is_cuda else None
        samples = interleave(steps, rounds, warmup, read_ledgers, synchronize)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return [
        DecodeRow(
            candidate=name,
            batch=batch,
            prompt_tokens=ids.shape[1],
            step=samples[name],
            bytes_cache=held(cache),
            bytes_weights=weights,
            attention=_per_round(spent[name], warmup) if name in spent else None,
        )
        for name, cache in caches.items()
    ]


def _ledger(cache: Any) -> float:
    """Seconds of all stages so far."""
    return sum(cache.meter.seconds().values())


def _per_round(totals: Sequence[float], warmup: int) -> Samples:
    return Samples([after - before for before, after in pairwise(totals)][warmup:])


def table(rows: Sequence[DecodeRow]) -> Table:
    """One line per candidate: time, and speed-ups beside what byte arithmetic allows."""
    made = Table(
        title="Time of one decode step; speed-up (allowed by bytes)",
        caption="attention: append, attend, observe and evict, over all layers.",
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    made.add_column("batch", justify="right")
    made.add_column("candidate", overflow="fold")
    for title in ("ms", "low–high", "cache MiB", "vs transf.", "vs full"):
        made.add_column(title, justify="right")
    for title in ("attention ms", "vs full"):
        made.add_column(title, justify="right")
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
            *_attention(row, full),
        )
    return made


def _attention(row: DecodeRow, full: DecodeRow | None) -> tuple[str, str]:
    """Milliseconds, and the speed-up beside the ratio of the bytes of the caches."""
    if row.attention is None:
        return "–", "–"
    taken = f"{row.attention.median * 1e3:.1f}"
    if full is None or full.attention is None:
        return taken, "–"
    ideal = full.bytes_cache / row.bytes_cache
    return taken, f"{full.attention.median / row.attention.median:.2f}× ({ideal:.2f}×)"


def _step(rival: Candidate, token: torch.Tensor, cache: Any) -> Callable[[int], torch.Tensor]:
    return lambda _: rival.forward(token, cache)
