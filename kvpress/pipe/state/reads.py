"""What the decode steps of a layer read of its pages, counted for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.host import lasting
from kvpress.report.reads import ReadFigures
from kvpress.store.found import Found
from kvpress.store.moves import Moves

_TOGETHER = 32  # steps that are added up at once: each by itself would cost as much as choosing


class Reads:
    """Sums over the decode steps so far.

    last: which sequences the last step was of, None for all, and what it read.
    """

    def __init__(self) -> None:
        self.rows = self.held = self.boxes = self.short = self.turned = self.unsure = 0
        self._moves = Moves()
        self._heads = 0  # query heads that were certified
        # Tokens and bytes read, the sum and the largest of certificates: fp64, on the host.
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._steps: list[Found] = []  # that are not in the sums yet
        self.last: tuple[Sequence[int] | None, Found] | None = None

    def add(self, found: Found, held: int, group: Sequence[int] | None) -> None:
        """Counts a step of rows that hold so many tokens together."""
        self.rows += len(found.recent)
        self.held += held
        self.boxes += sum(looked.boxes for looked in found.looked)
        self.short += found.short
        self.unsure += found.unsure
        self._moves = self._moves.plus(found.moves)
        self._heads += found.lse_bN.numel() if found.certified else 0
        self._steps.append(found.counted())
        self.last = (group, found)
        if len(self._steps) >= _TOGETHER:
            self._fold()

    @lasting
    def _fold(self) -> None:
        """Adds up the steps that are not yet."""
        if not self._steps:
            return
        errors = (found.error_bN.flatten().cpu() for found in self._steps if found.certified)
        error_X = torch.cat([host.zeros(1, dtype=torch.float64), *errors])
        read_X = torch.cat([found.read_r for found in self._steps]).sum()
        bytes_X = torch.cat([found.bytes_r for found in self._steps]).sum()
        sums = (read_X, bytes_X, error_X.sum(), error_X.amax())
        parts = torch.stack([x.double().cpu() for x in sums])
        read, size, missed, largest = parts.tolist()
        before = self._sums
        self._sums = [before[0] + read, before[1] + size, before[2] + missed]
        self._sums.append(max(before[3], largest))
        self._steps.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept of the last steps."""
        every = [*self._steps, *([] if self.last is None else [self.last[1]])]
        tensors = (tensor.untyped_storage() for found in every for tensor in _tensors(found))
        return sum({x.data_ptr(): x.nbytes() for x in tensors}.values())

    @property
    def figures(self) -> ReadFigures | None:
        """All of it; None where no step was counted."""
        if not self.rows:
            return None
        self._fold()
        read, size, missed, largest = self._sums
        return ReadFigures(
            steps=self.rows,
            tokens_read=read / self.rows,
            tokens_held=self.held / self.rows,
            bytes_read=int(size),
            boxes=self.boxes / self.rows,
            missed_mean=missed / self._heads if self._heads else None,
            missed_max=largest if self._heads else None,
            short=self.short,
            turned=self.turned,
            unsure=self.unsure,
            **self._moves._asdict(),
        )


def _tensors(found: Found) -> Iterator[Tensor]:
    yield from (found.out_bN1E, found.lse_bN, found.mass_bN, found.length_r)
    yield from (looked.judged_r for looked in found.looked if looked.judged_r is not None)
    for own in found.chosen:
        yield from (own.place_rW, own.pages_r)
