"""Memory: peak bytes while a prompt is read and while tokens are decoded, and what fits a cap.

Every candidate is measured in a process of its own, so that nothing that another one left behind
counts. Peaks are those of the whole process (or of the GPU), weights and buffers included.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from kvpress.bench.common.candidates import BASELINE, Candidate, candidate, warm_up
from kvpress.bench.common.journal import Row
from kvpress.bench.common.processes import in_a_process
from kvpress.bench.common.prompt import prompts
from kvpress.bench.common.storages import storage_bytes
from kvpress.bench.speed.peak import Peak
from kvpress.bench.speed.rows import Cell, Column
from kvpress.bench.speed.setting import Setting

TITLE = "Memory"
LEGEND = (
    "prefill MiB, decode MiB: the most bytes that the process (on a GPU: torch) held, weights"
    " included, while the prompts were read and while tokens were decoded. cache MiB: what the"
    " cache holds afterwards. batch: sequences of this length that decode together under the cap,"
    " at most, their prompts read one by one. context: tokens of this batch that can be read and"
    " decoded under it, at most."
)
_STEPS = 3  # decoded tokens of which the peak is taken
_PRECISION = 16  # a context is found to within a sixteenth of it


def measure(
    setting: Setting, cell: Cell, names: Sequence[str], on_round: Callable[[int], None]
) -> dict[str, Row]:
    """The rows of a cell, each from a process of its candidate."""
    rows = {}
    for number, name in enumerate(names):
        rows[name] = in_a_process(
            __name__, {**setting.to_dict(), "candidate": name, **cell._asdict()}
        )
        on_round(number)
    return rows


def main() -> None:
    """One job from standard input; its row is the last line of standard output."""
    job = json.loads(sys.stdin.read())
    place = {name: job.pop(name) for name in ("candidate", *Cell._fields)}
    setting = Setting(**job)
    torch.set_num_threads(setting.threads)
    model, tokenizer = setting.source.load()
    loaded = candidate(model, place["candidate"], setting.cache_dtype, _STEPS)
    tokens, batch = place["tokens"], place["batch"]
    ids = prompts(model, tokenizer, tokens, batch, _STEPS)
    with torch.inference_mode():
        warm_up(loaded.model)
        row = _peaks(loaded, ids)
        if setting.cap is not None:
            row["largest_batch"] = _largest_batch(loaded, ids[:1], setting.cap)
            row["largest_context"] = _largest_context(
                loaded, lambda length: prompts(model, tokenizer, length, batch, _STEPS), setting.cap
            )
    sys.stdout.write("\n" + json.dumps({**row, "error": None}))


def _peaks(candidate: Candidate, ids: torch.Tensor) -> Row:
    """Peaks of reading and decoding, and what is there before and after."""
    peak = Peak(ids.device)
    before = peak.now()
    cache = candidate.new_cache()
    candidate.forward(ids, cache)
    reading = peak.bytes()
    peak.reset()
    _decode(candidate, ids, cache)
    return {
        "bytes_before": before,
        "bytes_peak_prefill": reading,
        "bytes_peak_decode": peak.bytes(),
        "bytes_held": storage_bytes(cache),
    }


def _decode(candidate: Candidate, ids: torch.Tensor, cache: Any) -> None:
    for _ in range(_STEPS):
        candidate.forward(ids[:, -1:], cache)


def _largest_batch(candidate: Candidate, ids: torch.Tensor, cap: int) -> int:
    def peak_of(batch: int) -> int:
        peak = _fresh_peak(candidate, ids.device)
        _decode(candidate, ids.expand(batch, -1), candidate.read(ids, batch))
        return peak.bytes()

    return largest(_or_infinite(peak_of), cap, start=1, limit=None, precision=None)


def _largest_context(candidate: Candidate, prompt: Callable[[int], torch.Tensor], cap: int) -> int:
    def peak_of(tokens: int) -> int:
        ids = prompt(tokens)
        peak, cache = _fresh_peak(candidate, ids.device), candidate.new_cache()
        candidate.forward(ids, cache)
        _decode(candidate, ids, cache)
        return peak.bytes()

    config = candidate.model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    limit = None if positions is None else positions - _STEPS
    return largest(_or_infinite(peak_of), cap, start=256, limit=limit, precision=_PRECISION)


def _fresh_peak(candidate: Candidate, device: torch.device) -> Peak:
    """A peak in which nothing of the trial before counts."""
    candidate.new_cache()  # an engine remembers its newest cache: let it be an empty one
    gc.collect()
    return Peak(device)


def _or_infinite(peak_of: Callable[[int], int]) -> Callable[[int], float]:
    def peak(number: int) -> float:
        try:
            return peak_of(number)
        except torch.OutOfMemoryError:
            return math.inf

    return peak


def largest(
    peak_of: Callable[[int], float], cap: int, start: int, limit: int | None, precision: int | None
) -> int:
    """The largest number whose peak is at most the cap; 0 if not even that of `start` is.

    Peaks grow about evenly, so that each trial is where the line through the last two meets the
    cap: few trials, none far beyond it. The number is exact without a precision, and otherwise at
    most `1 / precision` of itself too small. A number beyond the limit is not tried.
    """
    trial = start if limit is None else min(start, limit)
    low, peak_low, high = 0, 0.0, math.inf
    while True:
        peak = peak_of(trial)
        slope = (peak - peak_low) / (trial - low) if low else math.inf
        if peak <= cap:
            low, peak_low = trial, peak
        else:
            high = trial
        step = low // precision if precision else 1
        if not low or low == limit or high - low <= max(1, step):
            return low
        # A line that is flat, or infinitely steep, says nothing: go on by doubling or halving.
        known = 0 < slope < math.inf
        guess = low + int((cap - peak_low) / slope) if known else min(2 * low, (low + high) / 2)
        most = min(4 * low, high - max(1, step), limit or math.inf)
        trial = int(min(max(guess, low + max(1, step)), max(most, low + 1)))


def columns(rows: dict[str, Row]) -> list[Column]:
    """What the table of one cell shows."""
    made = [
        Column("prefill MiB", lambda row: _mib(row["bytes_peak_prefill"])),
        Column("decode MiB", lambda row: _mib(row["bytes_peak_decode"])),
        Column("cache MiB", lambda row: _mib(row["bytes_held"])),
        Column("of tf", partial(_share, rows.get(BASELINE))),
    ]
    for title in ("batch", "context"):
        key = f"largest_{title}"
        if any(key in row for row in rows.values()):
            made.append(Column(title, partial(_count, key)))
    return made


def _count(key: str, row: Row) -> str:
    return f"{row[key]:,}"


def _share(base: Row | None, row: Row) -> str:
    return "–" if base is None else f"{row['bytes_held'] / base['bytes_held']:.1%}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


if __name__ == "__main__":
    main()
