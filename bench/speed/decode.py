"""Decoding after a long prompt: seconds of one step of the whole batch.

The prompt is read once per candidate and its cache repeated over the batch. Byte arithmetic is the
ratio that there would be if only bytes counted: weights and cache of the one by those of the other.
The linear layers, which are transformers' and PyTorch's, take longer than their bytes allow; what
is ours shows in the attention alone, which the engine's ledger times.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from kvpress.bench.common.candidates import BASELINE, FULL, Candidate, candidate, weight_bytes
from kvpress.bench.common.journal import Row
from kvpress.bench.common.reads import reads_of
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed.rounds import Measurement
from kvpress.bench.speed.rows import Column, against, milliseconds, of_ideal, times
from kvpress.bench.speed.setting import Setting

from kvpress.hf.cache import EngineCache

TITLE = "One decode step"
LEGEND = (
    "vs tf, vs full: speed-up over transformers and over the engine without compression, from"
    " medians. attention: that of appending, attending, observing and evicting alone. In brackets:"
    " what the bytes of weights and cache, or of the cache alone, would allow. Where a policy reads"
    " less than it holds: tokens that a row reads per step, and bytes that all layers read."
)


def measurement(
    setting: Setting, model: Any, ids: torch.Tensor, batch: int, name: str
) -> Measurement:
    """A candidate that decodes after `ids[:1]`, `batch` sequences together.

    With tiers after different prompts: sequences that are alike would share their pages.
    """
    new_tokens = setting.rounds + setting.warmup
    room = ids.shape[1] + new_tokens
    made = candidate(model, name, setting.cache_dtype, new_tokens, setting.caps, room)
    return _Decode(made, ids[:batch] if setting.caps else ids[:1], batch)


class _Decode:
    """A cache that grows by one token per round."""

    def __init__(self, candidate: Candidate, ids: torch.Tensor, batch: int) -> None:
        self._candidate, self._batch = candidate, batch
        copies = batch // len(ids)
        self._token = ids[:, -1:].repeat(copies, 1)
        self._cache = candidate.read(ids, copies)
        self._ledger = [_ledger(self._cache)]
        self._warmup = 0

    def round(self, number: int) -> torch.Tensor:
        return self._candidate.forward(self._token, self._cache)

    def settle(self, timed: bool) -> None:
        self._ledger.append(_ledger(self._cache))
        self._warmup += not timed

    def row(self, taken: Samples) -> Row:
        spent = [after - before for before, after in pairwise(self._ledger)][self._warmup :]
        return {
            "tokens_per_second": self._batch / taken.median,
            "attention": Samples(spent).to_dict() if any(spent) else None,
            "bytes_held": self._candidate.bytes_held(self._cache),
            "bytes_weights": weight_bytes(self._candidate.model),
            "reads": reads_of(self._cache),
        }


def _ledger(cache: Any) -> float:
    """Seconds of all stages so far; none for a cache that keeps no ledger."""
    known = isinstance(cache, EngineCache)
    return sum(cache.context.ledger.meter.seconds().values()) if known else 0.0


def read_columns(rows: dict[str, Row]) -> list[Column]:
    """What steps read, where one of the candidates reads less than it holds."""
    if not any(row.get("reads") for row in rows.values()):
        return []
    return [
        Column(
            "tokens read",
            lambda row: f"{row['reads']['tokens_read']:,.0f}" if row.get("reads") else "all",
        ),
        Column("read MiB", lambda row: f"{bytes_read(row) / 2**20:.0f}"),
    ]


def bytes_read(row: Row) -> int:
    """Bytes of the cache that a step reads."""
    reads: Row = row.get("reads") or {"bytes_read": row["bytes_held"]}
    return int(reads["bytes_read"])


def columns(rows: dict[str, Row]) -> list[Column]:
    """What the table of one cell shows."""
    full = rows.get(FULL)
    return [
        Column("ms", lambda row: milliseconds(row["seconds"]["median"])),
        Column("p95", lambda row: milliseconds(row["seconds"]["p95"])),
        Column("tok/s", lambda row: f"{row['tokens_per_second']:.1f}"),
        Column("MiB", lambda row: f"{row['bytes_held'] / 2**20:.0f}"),
        *read_columns(rows),
        Column("vs tf", lambda row: times(against(rows.get(BASELINE), row))),
        Column("vs full", partial(_against_full, full)),
        Column("attention", partial(_attention, full)),
    ]


def _against_full(full: Row | None, row: Row) -> str:
    return of_ideal(against(full, row), _bytes_read(full or row) / _bytes_read(row))


def _bytes_read(row: Row) -> int:
    return bytes_read(row) + int(row["bytes_weights"])


def _attention(full: Row | None, row: Row) -> str:
    if full is None or row["attention"] is None:
        return "–"
    gain = full["attention"]["median"] / row["attention"]["median"]
    return of_ideal(gain, bytes_read(full) / bytes_read(row))
