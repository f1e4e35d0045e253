"""Keys and values that are large among their neighbours (CurDKV, Sengupta et al., arXiv
2509.15038).

1. The squared norms of keys and of values are divided by their mean over a window of `window`
   positions.
2. A slot's score is the product of both shares.

Differs from the paper: it speaks of leverage scores, of which the published code keeps these norms;
windows go by position, and a last one that is not full joins the one before (there it is padded
with zeros, which makes its scores larger).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Budget, Policy, Slots, option


@dataclass(frozen=True, kw_only=True)
class Cur(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (code: 4)", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )
    window: int = option(16, "positions that share a mean (code: 16)", low=1)
    of: Literal["both", "keys", "values"] = option(
        "both", "whose norms count", choices=("both", "keys", "values")
    )

    def score(self, slots: Slots) -> Tensor:
        position_BHS = slots.position_BHS
        full_B11 = (slots.seen_B // self.window).clamp_min(1)[:, None, None]
        window_BHS = (position_BHS.clamp_min(0) // self.window).minimum(full_B11 - 1)
        held_BHS = (position_BHS != EMPTY).float()
        score_BHS = torch.ones_like(held_BHS)
        for name, column in (("keys", slots.key_BHSD), ("values", slots.value_BHSD)):
            if self.of in ("both", name):
                score_BHS = score_BHS * self._share(column, window_BHS, held_BHS)
        return score_BHS

    def _share(self, column_BHSX: Tensor, window_BHS: Tensor, held_BHS: Tensor) -> Tensor:
        square_BHS = column_BHSX.float().square().sum(-1) * held_BHS
        sums_BHW = square_BHS.new_zeros(*square_BHS.shape[:2], int(window_BHS.max()) + 1)
        counts_BHW = sums_BHW.scatter_add(2, window_BHS, held_BHS).clamp_min(1)
        mean_BHW = sums_BHW.scatter_add(2, window_BHS, square_BHS) / counts_BHW
        return square_BHS / mean_BHW.gather(2, window_BHS).clamp_min(1e-30)
