"""A candidate in a process of its own, for what a whole process is set to: how it allocates."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any

import torch
from kvpress.bench.common.journal import Row
from kvpress.bench.common.lines import Other
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting

# Blocks up to 1 GiB come from the heap, and what is freed stays there. By default glibc maps every
# block of more than 32 MiB anew, and its pages are zeroed one by one when they are written to.
ROOMY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class ApartMeasurement:
    """What the other process measures; seconds are those of its own clock."""

    def __init__(
        self, setting: Setting, ids: torch.Tensor, cell: Cell, name: str, named: str
    ) -> None:
        command = [sys.executable, "-m", "kvpress.bench.speed.apart_child"]
        self._other = Other(named, command, {**os.environ, **ROOMY})
        self._seconds: list[float] = []
        self._last = 0.0
        given = {"cell": list(cell), "name": name, "tokens": ids.tolist()}
        self._other.request(do="start", setting=asdict(setting), **given)

    def round(self, number: int) -> None:
        """One round there."""
        self._last = self._other.request(do="round", number=number)["seconds"]

    def settle(self, timed: bool) -> None:
        """What has to be done there after it."""
        if timed:
            self._seconds.append(self._last)
        self._other.request(do="settle", timed=timed)

    def row(self, taken: Samples) -> Row:
        """As of the benchmark's other candidates, with the seconds of the other process."""
        own: dict[str, Any] = self._other.request(do="row", seconds=self._seconds)
        self._other.close()
        return {**own, "seconds": Samples(self._seconds).to_dict()}
