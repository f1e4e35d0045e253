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
    merging: Merging, threshold_B: Tensor, similarity_BHE: Tensor, real_BHE: Tensor
) -> Tensor:
    """The threshold of every sequence after an eviction: fp32 `[B]`.

    threshold_B: before it; NaN where nothing was evicted yet. real_BHE: the slots that have a
    nearest key; a sequence without any keeps its threshold.
    """
    count_B = real_BHE.sum((1, 2))
    mean_B = similarity_BHE.where(real_BHE, 0.0).sum((1, 2)) / count_B
    top_B = similarity_BHE.where(real_BHE, -torch.inf).amax((1, 2)) if merging.largest else mean_B
    memory, gain = merging.motion
    moved_B = memory * threshold_B + gain * top_B
    moved_B = torch.where(threshold_B.isnan(), mean_B, moved_B)
    return torch.where(count_B > 0, moved_B, threshold_B)


def merged(
    merging: Merging, threshold_B: Tensor, similarity_BHE: Tensor, real_BHE: Tensor
) -> Tensor:
    """Which evicted slots are merged, the others being dropped: bool `[B, H, E]`."""
    u_BHE = similarity_BHE
    if merging.together:
        heads_B1E = real_BHE.sum(1, keepdim=True).clamp_min(1)
        u_BHE = similarity_BHE.where(real_BHE, 0.0).sum(1, keepdim=True) / heads_B1E
    return real_BHE & (u_BHE >= threshold_B[:, None, None])


class Shares(NamedTuple):
    """What vectors count in the kept slots that they end in: fp32."""

    evicted_BHE: Tensor  # 0 for what is dropped
    kept_BHC: Tensor  # 1 where nothing is merged in
    got_BHC: Tensor  # how many are merged in
    target_BHE: Tensor  # the kept slot of every evicted one

    def add(self, kept_BHCD: Tensor, evicted_BHED: Tensor) -> Tensor:
        """The kept vectors with the merged ones in them, in their dtype; others bit for bit."""
        sums_BHCD = (kept_BHCD.float() * self.kept_BHC[..., None]).contiguous()
        part_ND = (evicted_BHED.float() * self.evicted_BHE[..., None]).flatten(0, 2)
        into_N = _flat(self.target_BHE, kept_BHCD.shape[2])
        used_N = (self.evicted_BHE != 0).flatten().nonzero().flatten()
        sums_BHCD.flatten(0, 2).index_add_(0, into_N[used_N], part_ND[used_N])
        return torch.where(self.got_BHC[..., None] > 0, sums_BHCD.to(kept_BHCD.dtype), kept_BHCD)


def shares(
    merging: Merging, similarity_BHE: Tensor, target_BHE: Tensor, merged_BHE: Tensor, kept: int
) -> Shares:
    """What merged slots and the kept ones that they are merged into count."""
    u_BHE = similarity_BHE.where(merged_BHE, 0.0)
    raw_BHE = (u_BHE.exp() if merging.normalised else u_BHE).where(merged_BHE, 0.0)
    got_BHC = _sum_by_target(merged_BHE.float(), target_BHE, kept)
    if merging.normalised:
        own, whole_BHC = merging.own, merging.own + _sum_by_target(raw_BHE, target_BHE, kept)
    else:
        own, whole_BHC = 1.0, 1.0 + got_BHC
    share_BHC = torch.where(got_BHC > 0, own / whole_BHC, 1.0)
    return Shares(raw_BHE / whole_BHC.gather(2, target_BHE), share_BHC, got_BHC, target_BHE)


def add_counts(
    bias_BHC: Tensor, evicted_BHE: Tensor, target_BHE: Tensor, merged_BHE: Tensor
) -> Tensor:
    """The log of the number of tokens in every kept slot, in the dtype of `bias_BHC`."""
    count_BHE = evicted_BHE.float().exp().where(merged_BHE, 0.0)
    count_BHC = bias_BHC.float().exp() + _sum_by_target(count_BHE, target_BHE, bias_BHC.shape[2])
    return count_BHC.log().to(bias_BHC.dtype)


def _sum_by_target(values_BHE: Tensor, target_BHE: Tensor, kept: int) -> Tensor:
    """For every kept slot the sum over the slots that have it as their target: `[B, H, C]`."""
    sums_BHC = values_BHE.new_zeros(*values_BHE.shape[:2], kept)
    return sums_BHC.scatter_add_(2, target_BHE, values_BHE)


def _flat(target_BHE: Tensor, kept: int) -> Tensor:
    """Targets as rows of all kept slots, row after row."""
    batch, heads, _ = target_BHE.shape
    first_BH1 = torch.arange(batch * heads, device=target_BHE.device).view(batch, heads, 1) * kept
    return (target_BHE + first_BH1).flatten()
