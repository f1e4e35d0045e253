"""The process of `apart.py`: answers until standard input ends."""

from __future__ import annotations

import time
from typing import Any

import torch
from kvpress.bench.common.answers import answer
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed import benches
from kvpress.bench.speed.rounds import Measurement
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting


class Child:
    """A candidate, of which rounds are asked. What it is asked to do are its methods."""

    def __init__(self) -> None:
        self._measurement: Measurement | None = None

    def start(
        self, setting: dict[str, Any], cell: list[Any], name: str, tokens: list[list[int]]
    ) -> dict[str, Any]:
        """Loads the model and makes the candidate."""
        made = Setting(**setting)
        torch.set_num_threads(made.threads)
        model, _ = made.source.load()
        ids = torch.tensor(tokens, device=model.device)
        local = benches.LocalCandidates()
        self._measurement = local.measurement(made, model, ids, Cell(*cell), name)
        return {}

    def round(self, number: int) -> dict[str, Any]:
        """The seconds of one round."""
        begun = time.perf_counter()
        self._own.round(number)
        return {"seconds": time.perf_counter() - begun}

    def settle(self, timed: bool) -> dict[str, Any]:
        """What is done between rounds."""
        self._own.settle(timed)
        return {}

    def row(self, seconds: list[float]) -> dict[str, Any]:
        """What was measured."""
        return self._own.row(Samples(seconds))

    @property
    def _own(self) -> Measurement:
        assert self._measurement is not None, "start comes first"
        return self._measurement


def main() -> None:
    """Answers until standard input ends."""
    child = Child()
    answer(lambda request: getattr(child, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
