"""The benchmarks of models by name, and how one cell of each is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from kvpress.bench.common.candidates import BASELINE, MALLOC
from kvpress.bench.common.journal import Row
from kvpress.bench.common.prompt import prompts
from kvpress.bench.common.report import Sheet
from kvpress.bench.quality.system import LocalSystem, System
from kvpress.bench.speed import decode, layer, memory, prefill, throughput
from kvpress.bench.speed.apart import ApartMeasurement
from kvpress.bench.speed.rounds import Measurement, run_rounds
from kvpress.bench.speed.rows import Cell, sheets
from kvpress.bench.speed.setting import Setting

TIMED = {"decode": decode, "prefill": prefill, "throughput": throughput}
BENCHES = {**TIMED, "memory": memory, layer.NAME: layer}
Load = Callable[[], tuple[Any, Any]]  # a model and its tokenizer
OnRound = Callable[[int], None]


class Candidates(Protocol):
    """Where candidates come from, by name."""

    def measurement(
        self, setting: Setting, model: Any, ids: torch.Tensor, cell: Cell, name: str
    ) -> Measurement:
        """One that is timed on the prompts `[batch, tokens]`."""

    def system(self, model: Any, name: str) -> System:
        """One that answers questions about contexts."""


class LocalCandidates:
    """Candidates in this process: policies, and transformers' caches."""

    def measurement(
        self, setting: Setting, model: Any, ids: torch.Tensor, cell: Cell, name: str
    ) -> Measurement:
        """One that is timed."""
        if name == MALLOC:
            return ApartMeasurement(setting, ids, cell, BASELINE, MALLOC)
        made: Measurement = TIMED[cell.bench].measurement(setting, model, ids, cell.batch, name)
        return made

    def system(self, model: Any, name: str) -> System:
        """One that answers questions about contexts."""
        return LocalSystem(model, name)


def rounds(bench: str, setting: Setting, count: int) -> int:
    """How often `on_round` is called for one cell of so many candidates."""
    return count if bench == "memory" else setting.rounds + setting.warmup


def measure(
    setting: Setting,
    candidates: Candidates,
    load: Load,
    on_round: OnRound,
    cell: Cell,
    names: Sequence[str],
) -> dict[str, Row]:
    """A row per candidate. The model is loaded only where this process runs it."""
    if cell.bench == "memory":
        return memory.measure(setting, cell, names, on_round)
    model, tokenizer = load()
    if cell.bench == layer.NAME:
        return layer.measure(setting, model, tokenizer, cell, names, on_round)
    new_tokens = max(setting.new_tokens, setting.rounds + setting.warmup)
    ids = prompts(model, tokenizer, cell.tokens, cell.batch, new_tokens)
    return timed(setting, candidates, model, ids, cell, names, on_round)


def timed(
    setting: Setting,
    candidates: Candidates,
    model: Any,
    ids: torch.Tensor,
    cell: Cell,
    names: Sequence[str],
    on_round: OnRound | None = None,
) -> dict[str, Row]:
    """A row per candidate of a benchmark of time. ids: the prompts, `[batch, tokens]`."""
    starts = {
        name: partial(candidates.measurement, setting, model, ids, cell, name) for name in names
    }
    synchronize = torch.cuda.synchronize if ids.is_cuda else None
    return run_rounds(starts, setting.rounds, setting.warmup, on_round, synchronize)


def sheets_of(rows: Iterable[Row]) -> list[Sheet]:
    """A table in texts for every cell of any of the benchmarks."""
    return list(sheets(rows, BENCHES))
