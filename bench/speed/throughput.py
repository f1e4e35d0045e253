"""Whole generations: prompts of a batch in, so many new tokens for each out, through `generate`."""

from __future__ import annotations

from typing import Any

import torch
from kvpress.bench.common.candidates import BASELINE, FULL, Candidate, candidate
from kvpress.bench.common.journal import Row
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed.rounds import Measurement
from kvpress.bench.speed.rows import Column, against, times
from kvpress.bench.speed.setting import Setting

TITLE = "Batched generate"
LEGEND = (
    "tok/s: new tokens of the whole batch per second, reading the prompts included. vs tf, vs full:"
    " speed-up over transformers and over the engine without compression, from medians."
)


def measurement(
    setting: Setting, model: Any, ids: torch.Tensor, batch: int, name: str
) -> Measurement:
    """A candidate that generates from the prompts `ids`, `[B, Q]`."""
    new_tokens = setting.new_tokens
    room = ids.shape[1] + new_tokens
    made = candidate(model, name, setting.cache_dtype, new_tokens, setting.caps, room)
    return _Generate(made, ids[:batch], setting.new_tokens)


class _Generate:
    """A candidate with its cache of this round."""

    def __init__(self, candidate: Candidate, ids: torch.Tensor, new_tokens: int) -> None:
        self._candidate, self._ids, self._new_tokens = candidate, ids, new_tokens
        self._cache: Any = None
        self._bytes = 0

    def round(self, number: int) -> torch.Tensor:
        self._cache = self._candidate.new_cache()
        return self._candidate.generate(self._ids, self._cache, self._new_tokens)

    def settle(self, timed: bool) -> None:
        self._bytes = self._candidate.bytes_held(self._cache)
        self._cache = self._candidate.new_cache()  # see prefill: nothing is freed while timed

    def row(self, taken: Samples) -> Row:
        tokens = self._ids.shape[0] * self._new_tokens
        return {"bytes_held": self._bytes, "tokens_per_second": tokens / taken.median}


def columns(rows: dict[str, Row]) -> list[Column]:
    """What the table of one cell shows."""
    full, base = rows.get(FULL), rows.get(BASELINE)
    return [
        Column("seconds", lambda row: f"{row['seconds']['median']:.2f}"),
        Column("low–high", lambda row: "{low:.2f}–{high:.2f}".format(**row["seconds"])),
        Column("tok/s", lambda row: f"{row['tokens_per_second']:.1f}"),
        Column("MiB", lambda row: f"{row['bytes_held'] / 2**20:.0f}"),
        Column("vs tf", lambda row: times(against(base, row))),
        Column("vs full", lambda row: times(against(full, row))),
    ]
