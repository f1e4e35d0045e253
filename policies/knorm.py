"""Keep the keys with the smallest norm (Devoto et al., EMNLP 2024, arXiv 2406.11430).

1. The score of a token is −‖k‖₂ of its rotated key, per KV head (section 3).
2. The largest scores stay.

Differs from the paper: nothing. The first layers can be spared there; here every layer has the same
budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import Budget, Policy, Slots, option


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    budget: Budget = option(0.5, "kept: fraction (0.5, 0.5prompt), tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(
        1, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )

    def score(self, slots: Slots) -> Tensor:
        norm_BHS: Tensor = torch.linalg.vector_norm(slots.key_BHSD.float(), dim=-1)
        return -norm_BHS
