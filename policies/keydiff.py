"""Keys that are unlike the others (KeyDiff, Park et al., arXiv 2504.15364).

1. The anchor of a row is the mean of its keys, each of length 1.
2. A slot's score is minus the cosine of its key with the anchor: what points elsewhere stays.

Differs from the paper: a prompt is compressed once behind each of its chunks, not block by block;
keys are those that are stored, rotated at their positions (as in the published code).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvpress.policy import EMPTY, Budget, Policy, Slots, option


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(0, "first tokens that always stay", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0
    )

    def score(self, slots: Slots) -> Tensor:
        unit_BHSD = F.normalize(slots.key_BHSD.float(), dim=-1)
        held_BHS1 = (slots.position_BHS != EMPTY)[..., None]
        anchor_BH1D = (unit_BHSD * held_BHS1).sum(2, keepdim=True)
        return -(unit_BHSD * F.normalize(anchor_BH1D, dim=-1)).sum(-1)
