"""What transformers asks of caches and of their layers when sequences move: methods of both."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvpress import host


class Selects(Protocol):
    """Whatever has sequences, of which `select` makes a new list."""

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first tokens."""
        ...

    def select(self, index: list[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        ...


def reorder_cache(self: Selects, beam_idx: Tensor) -> None:
    """Sequence i becomes what sequence `beam_idx[i]` was."""
    self.select(beam_idx.tolist())


def batch_repeat_interleave(self: Selects, repeats: int) -> None:
    """Repeats every sequence `repeats` times."""
    self.select([b for b in range(max(0, self.batch_size)) for _ in range(repeats)])


def batch_select_indices(self: Selects, indices: Tensor) -> None:
    """Keeps the sequences at `indices` (integers, or one boolean per sequence)."""
    if self.batch_size > 0:
        chosen = host.arange(self.batch_size)[torch.as_tensor(indices, device="cpu")]
        self.select(chosen.tolist())
