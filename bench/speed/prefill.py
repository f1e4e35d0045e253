"""Time to first token: an empty cache, the whole prompt, the likeliest next token.

What the engine's ledger says about the stages tells what scoring costs. Where one pass gives the
attention and its sums, all of it counts as attention: what scoring costs shows only beside the
attention of the engine without compression.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from kvpress.bench.common.candidates import BASELINE, FULL, Candidate, candidate
from kvpress.bench.common.journal import Row
from kvpress.bench.common.storages import storage_bytes
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed.rounds import Measurement
from kvpress.bench.speed.rows import Column, against, milliseconds, times
from kvpress.bench.speed.setting import Setting

from kvpress.hf.cache import EngineCache

TITLE = "Time to first token"
LEGEND = (
    "attend, observe, keep (select and store): stages of the engine, over all layers, ms. vs tf, vs"
    " full: speed-up over transformers and over the engine without compression. scoring: (attention"
    " + observe) / attention of full. All from medians."
)
ATTENTION, OBSERVE = "prefill attention", "observe"
KEEP = ("select", "store")
STAGES = (ATTENTION, OBSERVE, *KEEP)
_RANGE = ("low", "high")


def measurement(
    setting: Setting, model: Any, ids: torch.Tensor, batch: int, name: str
) -> Measurement:
    """A candidate that reads the prompts `ids`, `[B, Q]`."""
    room = ids.shape[1]
    return _Prefill(candidate(model, name, setting.cache_dtype, room=room), ids[:batch])


class _Prefill:
    """A candidate with its cache of this round, and what the ledgers of earlier rounds said."""

    def __init__(self, candidate: Candidate, ids: torch.Tensor) -> None:
        self._candidate, self._ids = candidate, ids
        self._cache: Any = None
        self._bytes = 0
        self._stages: list[dict[str, float]] = []

    def round(self, number: int) -> torch.Tensor:
        self._cache = self._candidate.new_cache()
        return self._candidate.forward(self._ids, self._cache)[:, -1].argmax(-1)

    def settle(self, timed: bool) -> None:
        self._bytes = storage_bytes(self._cache)
        # A ledger starts at zero with its cache, so that what it says is this round's.
        if timed and isinstance(self._cache, EngineCache):
            self._stages.append(self._cache.context.ledger.meter.seconds())
        # An engine remembers its newest cache. Without this empty one it would free the used one
        # inside the next round, which is timed.
        self._cache = self._candidate.new_cache()

    def row(self, taken: Samples) -> Row:
        stages = {
            stage: Samples([spent[stage] for spent in self._stages]).to_dict()
            for stage in (STAGES if self._stages else ())
        }
        tokens = self._ids.numel()
        return {
            "stages": stages,
            "bytes_held": self._bytes,
            "tokens_per_second": tokens / taken.median,
        }


def columns(rows: dict[str, Row]) -> list[Column]:
    """What the table of one cell shows."""
    full, base = rows.get(FULL), rows.get(BASELINE)
    return [
        Column("ms", lambda row: milliseconds(row["seconds"]["median"])),
        Column("low–high", lambda row: "–".join(milliseconds(row["seconds"][k]) for k in _RANGE)),
        Column("MiB", lambda row: f"{row['bytes_held'] / 2**20:.0f}"),
        Column("vs tf", lambda row: times(against(base, row))),
        Column("vs full", lambda row: times(against(full, row))),
        Column("attend", partial(_stages, (ATTENTION,))),
        Column("observe", partial(_stages, (OBSERVE,))),
        Column("keep", partial(_stages, KEEP)),
        Column("scoring", lambda row: times(scoring(row, full))),
    ]


def _stages(names: tuple[str, ...], row: Row) -> str:
    if not row["stages"]:
        return "–"
    return milliseconds(sum(row["stages"][name]["median"] for name in names))


def scoring(row: Row, full: Row | None) -> float | None:
    """(attention + observe) / attention of the engine without compression, from the medians.

    1 if scoring were free; None for transformers, and where `full` was not measured.
    """
    if full is None or not row["stages"]:
        return None
    taken = row["stages"][ATTENTION]["median"] + row["stages"][OBSERVE]["median"]
    return float(taken / full["stages"][ATTENTION]["median"])
