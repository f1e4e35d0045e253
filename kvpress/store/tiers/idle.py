"""Pages of a device that no last step chose: they leave first when others want their room."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from kvpress.store.tiers.directory import NOWHERE, Directory

_QUEUED = 256  # lists of pages that are kept side by side


class Idle:
    """Idle pages of one shelf that have a copy below, in the order in which they became so."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._queue: deque[Tensor] = deque()
        self._unseen = False  # whether pages came that no step ever chose

    def came(self) -> None:
        """Says that pages came to the device which no step chose."""
        self._unseen = True

    def choose(self, before_A: Tensor, last: int | Tensor, id_A: Tensor, step: int) -> bool:
        """Says which pages a step chose, and which the step `last` of the same rows.

        Returns whether pages without a copy below are idle since then.
        """
        idle_A = self._directory.choose(before_A, last, id_A, step)
        if not len(idle_A):
            return False
        self._queue.append(idle_A)
        if len(self._queue) > _QUEUED:  # nobody wants room: who does will find them all
            self._queue.clear()
            self._unseen = True
        return bool((self._directory.record_P[idle_A] == NOWHERE).any())

    def next(self, most: int) -> Tensor | None:
        """So many pages that may leave, or fewer or none before others; None at the end."""
        if not self._queue:
            if not self._unseen:
                return None
            self._unseen = False
            self._queue.append(self._directory.spare())
        some_A = self._queue.popleft()
        if len(some_A) > most:
            self._queue.appendleft(some_A[most:])
            some_A = some_A[:most]
        spare_A: Tensor = torch.unique(some_A[self._directory.is_spare(some_A)])
        return spare_A  # each once: beams share pages
