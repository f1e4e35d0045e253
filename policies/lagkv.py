"""Tokens that stand out from those that follow (LagKV, Liang et al., arXiv 2504.04704).

1. Behind the sinks, slots are parted into partitions of `lag`. Each is normalised channel by
   channel with the smallest and the largest number of the next one.
2. The standard deviation over the channels, softmaxed over the partition, is averaged over keys and
   values.
3. Slots rank inside their partition, so that all partitions keep the same share; the last partition
   and what is behind it stay first. Shorter texts keep their last tokens.

Differs from the paper: channels that never change in the next partition are left out rather than
divided by zero; counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.policy import EMPTY, Budget, Policy, Slots, gather, option


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (code: 4)", low=0)
    recent: int = option(0, "last tokens that always stay", low=0)
    interval: int = option(
        0, "decoded tokens between evictions; 0 evicts after prompts only", low=0, high=0
    )
    lag: int = option(128, "slots of a partition (code: 128)", low=2)
    cross: bool = option(False, "compares the scores of all partitions, not ranks inside each")

    def score(self, slots: Slots) -> Tensor:
        position_BHS = slots.position_BHS
        last_BHS = position_BHS.masked_fill(position_BHS == EMPTY, 2**62)
        order_BHS = last_BHS.argsort(dim=-1)
        score_BHS = (
            position_BHS.gather(2, order_BHS).float() + 2
        )  # later is better, above all ranks
        parts = (position_BHS.shape[2] - self.sink) // self.lag
        if parts > 1:
            columns = (gather(x, order_BHS) for x in (slots.key_BHSD, slots.value_BHSD))
            key, value = (self._apart(x.float(), parts) for x in columns)
            made = (key + value) / 2
            rank = made if self.cross else made.argsort(-1).argsort(-1) / self.lag
            count_BH1 = (position_BHS != EMPTY).sum(-1, keepdim=True) - self.sink
            end = self.sink + (parts - 1) * self.lag
            place_P = torch.arange(parts - 1, device=rank.device).repeat_interleave(self.lag)
            scored_BHP = place_P < count_BH1 // self.lag - 1
            part_BHP = score_BHS[..., self.sink : end]
            score_BHS[..., self.sink : end] = rank.flatten(2).float().where(scored_BHP, part_BHP)
        return torch.empty_like(score_BHS).scatter_(2, order_BHS, score_BHS)

    def _apart(self, column_BHSX: Tensor, parts: int) -> Tensor:
        """How much each slot of all partitions but the last stands out: `[B, H, P - 1, lag]`."""
        part_BHSX = column_BHSX[:, :, self.sink : self.sink + parts * self.lag]
        of_BHPSX = part_BHSX.reshape(*part_BHSX.shape[:2], parts, self.lag, -1)
        least, most = of_BHPSX[:, :, 1:].aminmax(dim=3, keepdim=True)
        used = (most > least).expand_as(of_BHPSX[:, :, 1:])
        shown = ((of_BHPSX[:, :, :-1] - least) / (most - least)).where(used, 0.0)
        count = used.sum(-1)
        mean = shown.sum(-1) / count.clamp_min(1)
        square = (shown - mean[..., None]).square().where(used, 0.0).sum(-1)
        apart: Tensor = (square / (count - 1).clamp_min(1)).sqrt().softmax(-1)
        return apart
