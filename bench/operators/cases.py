"""All cases of the operators, in the order of the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kvpress.bench.operators.case_match import MatchShape, match_keys_case
from kvpress.bench.operators.case_packed import packed_case
from kvpress.bench.operators.case_rows import decode_rows_case
from kvpress.bench.operators.case_slots import slots_case
from kvpress.bench.operators.case_step import decode_step_case
from kvpress.bench.operators.case_sums import SumsShape, attention_sums_case
from kvpress.bench.operators.probe import ROTATION
from kvpress.bench.operators.registry import Case
from kvpress.bench.operators.rows import RowsShape

SMOL = {"heads": 3, "group": 3, "width": 64}  # SmolLM2-135M
LLAMA = {"heads": 8, "group": 4, "width": 128}  # Llama 3 8B
LLAMA_2 = {
    "heads": 8,
    "group": 1,
    "width": 128,
}  # a quarter of Llama 2 7B: a KV head per query head
STORAGE = (torch.float32, torch.bfloat16)
QUICK_ROTATION = 1 << 20


def cases(quick: bool = False, long: bool = False) -> list[Case]:
    """All cases; `quick` makes them tiny, `long` adds prompts of 8,192 tokens."""
    rotation = QUICK_ROTATION if quick else ROTATION
    rows = list(_rows(quick))
    made = [decode_rows_case(shape, rotation, baseline) for shape, baseline in rows]
    made += [decode_step_case(shape, rotation) for shape, _ in rows]
    made += [packed_case(shape, rotation) for shape in _packed(quick)]
    for tokens in _prompts(quick, long):
        for noise in ("none", "fresh"):
            for window in (None, 64):
                settings: dict[str, Any] = {**SMOL, "noise": noise, "window": window}
                made.append(attention_sums_case(SumsShape(tokens=tokens, **settings)))
    made += [match_keys_case(shape) for shape in _matches(quick)]
    slots = next(shape for shape, _ in rows)
    return made + [slots_case(name, slots, rotation) for name in ("gather_slots", "scatter_slots")]


def _rows(quick: bool) -> Iterator[tuple[RowsShape, bool]]:
    """The shapes of a decode, each with whether PyTorch's attention runs beside it.

    Equal and ragged rows with consecutive pages, and equal ones with shuffled pages.
    """
    sizes = ((1, SMOL, 8192, False), (8, SMOL, 8192, True), (1, LLAMA, 32768, True))
    for batch, model, slots, baseline in sizes:
        for dtype in STORAGE:
            length = slots // 128 + 1 if quick else slots
            shape: dict[str, Any] = {"batch": batch, "slots": length, "dtype": dtype, **model}
            yield RowsShape(ragged=False, **shape), baseline
            # No baseline: a dense cache would pad ragged rows to about three times their bytes.
            yield RowsShape(ragged=True, **shape), False
            yield RowsShape(ragged=False, shuffled=True, **shape), False


def _packed(quick: bool) -> Iterator[RowsShape]:
    """The shapes of old slots: 32,768 of them, and a batch of 8 after 8,000 tokens."""
    for batch, model, slots in (
        (1, LLAMA_2, 32768),
        (1, SMOL, 32768),
        (8, SMOL, 8000),
        (1, LLAMA, 32768),
    ):
        length = 320 if quick else slots
        shape: dict[str, Any] = {"batch": batch, "slots": length, **model}
        yield RowsShape(dtype=torch.bfloat16, ragged=False, **shape)


def _matches(quick: bool) -> Iterator[MatchShape]:
    """A fifth of a prompt of 8,000 tokens is kept."""
    evicted, kept = (160, 40) if quick else (6400, 1600)
    for dtype in STORAGE:
        yield MatchShape(evicted=evicted, kept=kept, heads=3, width=64, dtype=dtype)


def _prompts(quick: bool, long: bool) -> list[int]:
    if quick:
        return [80, 150] if long else [80]
    return [2048, 8192] if long else [2048]
