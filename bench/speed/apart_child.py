"""The process of `apart.py`: answers until standard input ends."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
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
    """Replies are lines; what others print must not mix with them."""
    replies, sys.stdout = sys.stdout, sys.stderr
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.inference_mode():
                reply = getattr(child, request.pop("do"))(**request)
        except Exception as error:  # the other side decides what a failure means
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
