"""Query-driven pruning of key channels (Xu et al., ICLR 2025, arXiv 2407.21018).

1. Score of channel j of a KV head: ‖q_j‖² · ‖k_j‖², with the last `window` queries of the prompt
   and all keys, rotated (section 3.2). Query heads of a group are pooled: the sum of their scores
   is the score of the stacked queries.
2. Keys that have left the last `recent` tokens keep the D − ⌊D·(1 − keep)⌋ best channels, the same
   ones for as long as the sequence lives; logits are still scaled by 1/√D.
3. Value channels (appendix D): ‖softmax(QKᵀ/√D) V_j‖², over the window, its causal mask applied.

Differs from the paper: one set per KV head (theirs: per query head, on repeated keys); new keys are
pruned as they become old (theirs stay whole); at most a 32nd of a row is recent. Defaults are those
of the code: keep 0.6, window 32, recent 32. `forward_selection` adds the channel that changes
‖QKᵀ‖ least, given those dropped before; `pairs` drops both channels that a rotation turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvpress import ops
from kvpress.policy import Channels, Need, Policy, PolicyError, Window, option, share


@dataclass(frozen=True, kw_only=True)
class ThinK(Policy):
    keep: float = option(0.6, "key channels kept, fraction (paper: 0.6)", low=0.01, high=1)
    value_keep: float = option(1.0, "value channels kept, fraction", low=0.01, high=1)
    window: int = option(32, "last queries of the prompt that decide (code: 32)", low=1)
    recent: int = option(
        32, "last tokens that keep all channels, at most a 32nd of a row (code: 32)", low=0
    )
    method: str = option(
        "greedy", "how key channels are chosen", choices=("greedy", "forward_selection")
    )
    pairs: bool = option(False, "drop pairs of channels that turn together (RoPE)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs and self.method != "greedy":
            raise PolicyError("pairs=true needs method=greedy: pairs are scored one by one.")

    @property
    def residual(self) -> int:
        return self.recent

    @property
    def watched(self) -> int:
        return self.window

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rotation"} if self.pairs else ())

    def prune(self, window: Window) -> Channels:
        return Channels(self._keys(window), self._values(window))

    def _keys(self, window: Window) -> Tensor | None:
        width = window.key_BHSD.shape[3]
        dropped = share(1 - Fraction(str(self.keep)), width)
        if dropped == 0:
            return None
        if self.method == "forward_selection":
            return _forward_selection(window, dropped)
        score_BHD = ops.channel_scores(window.query_BNQD, window.key_BHSD, window.held_BHS)
        if self.pairs and window.rotation is not None:
            score_BHD, dropped = _of_pairs(score_BHD, window), dropped // 2 * 2
        return _best(score_BHD, width - dropped)

    def _values(self, window: Window) -> Tensor | None:
        width = window.value_BHSE.shape[3]
        dropped = share(1 - Fraction(str(self.value_keep)), width)
        if dropped == 0:
            return None
        out_BHME = window.attention_BHMS @ window.value_BHSE.float()
        return _best(out_BHME.square().sum(2), width - dropped)


def _best(score_BHD: Tensor, kept: int) -> Tensor:
    """The channels with the largest scores, ascending; of equal ones the first stay."""
    order_BHD = score_BHD.argsort(dim=-1, descending=True, stable=True)
    return order_BHD[..., :kept].sort(dim=-1).values


def _of_pairs(score_BHD: Tensor, window: Window) -> Tensor:
    """Each channel with the sum of its pair's scores; unrotated ones are worth more than any."""
    rotation = window.rotation
    assert rotation is not None, "the caller checks"
    pairs, start = len(rotation.frequency_F), rotation.start
    sizes = (pairs, 2) if rotation.interleaved else (2, pairs)
    turned = score_BHD[..., start : start + 2 * pairs].reshape(*score_BHD.shape[:2], *sizes)
    dim = -1 if rotation.interleaved else -2
    summed = turned.sum(dim, keepdim=True).expand_as(turned).flatten(-2)
    score_BHD = torch.full_like(score_BHD, torch.inf)
    score_BHD[..., start : start + 2 * pairs] = summed
    return score_BHD


def _forward_selection(window: Window, dropped: int) -> Tensor:
    """Drops one channel at a time: that with the least G_jj + 2·Σ_l G_jl over those dropped.

    G = (QᵀQ) ∘ (KᵀK): the squared norm of what is lost is the sum of G over the dropped channels.
    """
    key_BHSD = window.key_BHSD.float() * window.held_BHS[..., None]
    batch, heads, _, width = key_BHSD.shape
    query_BHMD = window.query_BNQD.float().reshape(batch, heads, -1, width)
    gram_BHDD = (query_BHMD.mT @ query_BHMD) * (key_BHSD.mT @ key_BHSD)
    cost_BHD = gram_BHDD.diagonal(dim1=-2, dim2=-1).clone()
    lost_BHD = torch.zeros_like(cost_BHD, dtype=torch.bool)
    for _ in range(dropped):
        worst_BH1 = cost_BHD.masked_fill(lost_BHD, torch.inf).argmin(-1, keepdim=True)
        lost_BHD.scatter_(-1, worst_BH1, True)
        index = worst_BH1[..., None].expand(-1, -1, 1, width)
        cost_BHD += 2 * gram_BHDD.gather(2, index)[:, :, 0]
    return (~lost_BHD).nonzero()[:, -1].view(batch, heads, width - dropped)
