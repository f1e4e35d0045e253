"""What the last queries look at, and how much keys say the same (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 1 << 21  # cosines at once: numbers of 4 bytes, and as many whole numbers


def looked_at(
    query_BNQD: Tensor, key_BHSD: Tensor, open_BHS: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Softmax over open slots of the largest logit of a query group, mean over queries.

    fp32 `[B, H, S]`; 0 where a slot is closed.
    """
    batch, heads, slots, width = key_BHSD.shape
    query_BHXD = query_BNQD.float().reshape(batch, heads, -1, width)
    logits_BHXS = query_BHXD @ key_BHSD.float().mT * scaling
    if softcap:
        logits_BHXS = torch.tanh(logits_BHXS / softcap) * softcap
    # Group and queries are one dimension above: X is G · Q, the queries counting faster.
    most_BHQS = logits_BHXS.view(batch, heads, -1, query_BNQD.shape[2], slots).amax(2)
    weight_BHQS = most_BHQS.masked_fill(~open_BHS[:, :, None], -torch.inf).softmax(-1)
    return weight_BHQS.nan_to_num().mean(2)  # a row without an open slot has no weights


def redundancy(key_BHSD: Tensor, held_BHS: Tensor, alike: float) -> Tensor:
    """How much the keys of a row say what others say: fp32 `[B, H, S]`, 0 where there is none.

    The softmax of their mean cosines. Of the keys whose cosine with a key is above `alike`, which
    is not below 0, the latest one is not counted as its copy; where there is none, the earliest is
    not. Slots are in the order of their positions.
    """
    unit_BHSD = torch.nn.functional.normalize(key_BHSD.float(), dim=-1) * held_BHS[..., None]
    batch, heads, slots, _ = unit_BHSD.shape
    earliest_BH1 = held_BHS.int().argmax(-1, keepdim=True)
    at_S = torch.arange(slots, device=key_BHSD.device, dtype=torch.int32)
    total_BHS = torch.zeros_like(unit_BHSD[..., 0])
    rows = max(1, _MOST // (batch * heads * slots))
    for start in range(0, slots, rows):
        cosine_BHRS = unit_BHSD[:, :, start : start + rows] @ unit_BHSD.mT
        cosine_BHRS.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
        latest_BHR = at_S.where(cosine_BHRS > alike, -1).amax(-1).long()
        copied_BHR = torch.where(latest_BHR >= 0, latest_BHR, earliest_BH1)
        cosine_BHRS.scatter_(3, copied_BHR[..., None], 0.0)
        total_BHS += cosine_BHRS.sum(2)
    mean_BHS = total_BHS / held_BHS.sum(-1, keepdim=True).clamp_min(1)
    return mean_BHS.masked_fill(~held_BHS, -torch.inf).softmax(-1).nan_to_num()
