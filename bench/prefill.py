"""Time to first token: policies beside transformers' own cache on one prompt, in one run.

A round makes an empty cache, reads the whole prompt and takes the likeliest next token. What the
engine's ledger says about the stages tells what scoring costs. Where one pass gives the attention
and its sums, all of it counts as attention: what scoring costs shows only beside the attention of
the engine without compression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress.bench.candidates import BASELINE, FULL, Candidate, candidate, held
from kvpress.bench.timing import Samples, interleave
from rich.table import Table

POLICIES = ("full", "keyformer:budget=0.5", "snapkv:budget=0.5,window=64")
ATTENTION, OBSERVE = "prefill attention", "observe"
STAGES = (ATTENTION, OBSERVE, "select", "store")


@dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """One candidate: seconds to the first token and of every stage, and the bytes that it holds.

    stages: summed over the layers of a round; empty for transformers, which keeps no ledger.
    """

    candidate: str
    prompt_tokens: int
    first_token: Samples
    stages: Mapping[str, Samples]
    bytes_cache: int


def measure(
    model: Any,
    ids: torch.Tensor,
    policies: Sequence[str],
    rounds: int,
    warmup: int,
    cache_dtype: torch.dtype | None = None,
    on_round: Callable[[int], None] | None = None,
) -> list[PrefillRow]:
    """One row per candidate; a round reads the prompt `ids`, `[B, P]`, once with each.

    `on_round` is called with the number of every round, warm-up included, after it.
    """
    rivals = {
        name: _Rival(candidate(model, name, cache_dtype), ids) for name in (BASELINE, *policies)
    }

    def settle(number: int) -> None:
        for rival in rivals.values():
            rival.settle(timed=number >= warmup)
        if on_round is not None:
            on_round(number)

    with torch.inference_mode():
        calls = {name: rival.first_token for name, rival in rivals.items()}
        synchronize = torch.cuda.synchronize if ids.is_cuda else None
        samples = interleave(calls, rounds, warmup, settle, synchronize)
    return [
        PrefillRow(
            candidate=name,
            prompt_tokens=ids.shape[1],
            first_token=samples[name],
            stages=rival.samples,
            bytes_cache=rival.bytes_cache,
        )
        for name, rival in rivals.items()
    ]


@dataclass
class _Rival:
    """A candidate with its cache of this round, and what the ledgers of earlier rounds said."""

    candidate: Candidate
    ids: torch.Tensor
    cache: Any = None
    bytes_cache: int = 0
    stages: list[dict[str, float]] = field(default_factory=list)

    def first_token(self, _: int) -> torch.Tensor:
        """The next token of every sequence, `[B]`: what is timed."""
        self.cache = self.candidate.new_cache()
        return self.candidate.forward(self.ids, self.cache)[:, -1].argmax(-1)

    def settle(self, timed: bool) -> None:
        """Reads the ledger of the round's cache and lets go of the cache."""
        self.bytes_cache = held(self.cache)
        # A ledger starts at zero with its cache, so that what it says is this round's.
        if timed and hasattr(self.cache, "meter"):
            self.stages.append(self.cache.meter.seconds())
        # An engine remembers its newest cache. Without this empty one it would free the used one
        # inside the next round, which is timed.
        self.cache = self.candidate.new_cache()

    @property
    def samples(self) -> dict[str, Samples]:
        """Seconds of every stage, one value per timed round."""
        if not self.stages:
            return {}
        return {stage: Samples([taken[stage] for taken in self.stages]) for stage in STAGES}


def against_full(row: PrefillRow, rows: Sequence[PrefillRow]) -> float | None:
    """Time to first token / that of the engine without compression, from the medians.

    None where the latter was not measured.
    """
    full = _full(rows)
    return row.first_token.median / full.first_token.median if full else None


def scoring(row: PrefillRow, rows: Sequence[PrefillRow]) -> float | None:
    """(attention + observe) / attention of the engine without compression, from the medians.

    1 if scoring were free; None for transformers, and where `full` was not measured.
    """
    full = _full(rows)
    if full is None or not row.stages:
        return None
    taken = row.stages[ATTENTION].median + row.stages[OBSERVE].median
    return taken / full.stages[ATTENTION].median


def _full(rows: Sequence[PrefillRow]) -> PrefillRow | None:
    return next((row for row in rows if row.candidate == FULL), None)


def to_dicts(rows: Sequence[PrefillRow]) -> list[dict[str, Any]]:
    """Plain values, ready for JSON: seconds, bytes and the two ratios."""
    return [
        {
            "candidate": row.candidate,
            "prompt_tokens": row.prompt_tokens,
            **_seconds(row.first_token),
            "stages": {stage: _seconds(taken) for stage, taken in row.stages.items()},
            "first_token_over_full": against_full(row, rows),
            "attention_and_observe_over_full_attention": scoring(row, rows),
            "bytes_cache": row.bytes_cache,
        }
        for row in rows
    ]


def _seconds(taken: Samples) -> dict[str, Any]:
    return {
        "median_seconds": taken.median,
        "low_seconds": taken.low,
        "high_seconds": taken.high,
        "seconds": taken.seconds,
    }


def table(rows: Sequence[PrefillRow]) -> Table:
    """One line per candidate: time to first token, the stages in it, and the two ratios."""
    tokens = f"{rows[0].prompt_tokens:,}" if rows else "no"
    made = Table(
        title=f"Time to first token of {tokens} tokens, and its stages over all layers, ms",
        caption="vs full: time / that of the engine without compression. scoring: (attention +"
        " observe) / attention of full. All from medians.",
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    made.add_column("candidate", overflow="fold")
    for title in ("ms", "low–high", "vs full", "attend", *STAGES[1:], "scoring"):
        made.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        taken = row.first_token
        made.add_row(
            row.candidate,
            _ms(taken.median),
            f"{_ms(taken.low)}–{_ms(taken.high)}",
            _times(against_full(row, rows)),
            *(_ms(row.stages[stage].median) if row.stages else "–" for stage in STAGES),
            _times(scoring(row, rows)),
        )
    return made


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.1f}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"
