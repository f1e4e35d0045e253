"""What becomes of evicted slots: how they are merged into the kept ones with the nearest keys.

Pure functions on dense tensors, letters as in kvpress/types.py: C kept slot, E evicted slot.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KeyMerge = Literal["rotated", "unrotated", "values_only"]


class Merging(NamedTuple):
    """The rule by which evicted slots are merged; u is the cosine with the nearest kept key.

    A slot is merged where u reaches the threshold of its sequence and layer. The first eviction
    sets that to the mean u, each later one to `memory` · threshold + `gain` · its largest (or its
    mean) u. `fixed` is a threshold that never moves.

    normalised: merged slots weigh exp(u) and the kept one `own`, divided by their sum; otherwise u
    and 1, divided by the number of slots. together: the i-th evicted slots of all KV heads are
    merged or dropped together, by their mean u. keys: whether keys are averaged as they are stored,
    turned to the position of the kept one first, or not at all. sinks: whether sinks may be merged
    into. counts: whether a slot weighs in the softmax as often as tokens were merged into it.
    """

    own: float
    memory: float
    gain: float
    largest: bool = True
    normalised: bool = True
    together: bool = False
    fixed: float | None = None
    keys: KeyMerge = "rotated"
    sinks: bool = False
    counts: bool = False

    @property
    def initial(self) -> float:
        """The threshold before the first eviction; NaN: none yet."""
        return math.nan if self.fixed is None else self.fixed

    @property
    def motion(self) -> tuple[float, float]:
        """What the threshold before and the new similarities count."""
        return (self.memory, self.gain) if self.fixed is None else (1.0, 0.0)


def next_threshold(
    merging: Merging, threshold_B: Tensor, similarity_BHV: Tensor, real_BHV: Tensor
) -> Tensor:
    """The threshold of every sequence after an eviction: fp32 `[B]`.

    threshold_B: before it; NaN where nothing was evicted yet. real_BHV: the slots that have a
    nearest key; a sequence without any keeps its threshold.
    """
    count_B = real_BHV.sum((1, 2))
    mean_B = similarity_BHV.where(real_BHV, 0.0).sum((1, 2)) / count_B
    top_B = similarity_BHV.where(real_BHV, -torch.inf).amax((1, 2)) if merging.largest else mean_B
    memory, gain = merging.motion
    moved_B = memory * threshold_B + gain * top_B
    moved_B = torch.where(threshold_B.isnan(), mean_B, moved_B)
    return torch.where(count_B > 0, moved_B, threshold_B)


def merged(
    merging: Merging, threshold_B: Tensor, similarity_BHV: Tensor, real_BHV: Tensor
) -> Tensor:
    """Which evicted slots are merged, the others being dropped: bool `[B, H, E]`."""
    u_BHV = similarity_BHV
    if merging.together:
        heads_B1V = real_BHV.sum(1, keepdim=True).clamp_min(1)
        u_BHV = similarity_BHV.where(real_BHV, 0.0).sum(1, keepdim=True) / heads_B1V
    return real_BHV & (u_BHV >= threshold_B[:, None, None])


class Shares(NamedTuple):
    """What vectors count in the kept slots that they end in: fp32."""

    evicted_BHV: Tensor  # 0 for what is dropped
    kept_BHK: Tensor  # 1 where nothing is merged in
    got_BHK: Tensor  # how many are merged in
    target_BHV: Tensor  # the kept slot of every evicted one

    def add(self, kept_BHKD: Tensor, evicted_BHVD: Tensor) -> Tensor:
        """The kept vectors with the merged ones in them, in their dtype; others bit for bit."""
        sums_BHKD = (kept_BHKD.float() * self.kept_BHK[..., None]).contiguous()
        part_AD = (evicted_BHVD.float() * self.evicted_BHV[..., None]).flatten(0, 2)
        into_A = _flat(self.target_BHV, kept_BHKD.shape[2])
        used_A = (self.evicted_BHV != 0).flatten().nonzero().flatten()
        sums_BHKD.flatten(0, 2).index_add_(0, into_A[used_A], part_AD[used_A])
        return torch.where(self.got_BHK[..., None] > 0, sums_BHKD.to(kept_BHKD.dtype), kept_BHKD)


def shares(
    merging: Merging, similarity_BHV: Tensor, target_BHV: Tensor, merged_BHV: Tensor, kept: int
) -> Shares:
    """What merged slots and the kept ones that they are merged into count."""
    u_BHV = similarity_BHV.where(merged_BHV, 0.0)
    raw_BHV = (u_BHV.exp() if merging.normalised else u_BHV).where(merged_BHV, 0.0)
    got_BHK = _sum_by_target(merged_BHV.float(), target_BHV, kept)
    if merging.normalised:
        own, whole_BHK = merging.own, merging.own + _sum_by_target(raw_BHV, target_BHV, kept)
    else:
        own, whole_BHK = 1.0, 1.0 + got_BHK
    share_BHK = torch.where(got_BHK > 0, own / whole_BHK, 1.0)
    return Shares(raw_BHV / whole_BHK.gather(2, target_BHV), share_BHK, got_BHK, target_BHV)


def add_counts(
    bias_BHK: Tensor, evicted_BHV: Tensor, target_BHV: Tensor, merged_BHV: Tensor
) -> Tensor:
    """The log of the number of tokens in every kept slot, in the dtype of `bias_BHK`."""
    count_BHV = evicted_BHV.float().exp().where(merged_BHV, 0.0)
    count_BHK = bias_BHK.float().exp() + _sum_by_target(count_BHV, target_BHV, bias_BHK.shape[2])
    return count_BHK.log().to(bias_BHK.dtype)


def _sum_by_target(values_BHV: Tensor, target_BHV: Tensor, kept: int) -> Tensor:
    """For every kept slot the sum over the slots that have it as their target: `[B, H, C]`."""
    sums_BHK = values_BHV.new_zeros(*values_BHV.shape[:2], kept)
    return sums_BHK.scatter_add_(2, target_BHV, values_BHV)


def _flat(target_BHV: Tensor, kept: int) -> Tensor:
    """Targets as rows of all kept slots, row after row."""
    batch, heads, _ = target_BHV.shape
    first_BH1 = torch.arange(batch * heads, device=target_BHV.device).view(batch, heads, 1) * kept
    return (target_BHV + first_BH1).flatten()
