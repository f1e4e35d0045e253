"""What the last queries look at, and how much keys say the same (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512  # keys that are compared with all others at once


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


def redundancy(key_BHSD: Tensor, position_BHS: Tensor, open_BHS: Tensor, alike: float) -> Tensor:
    """How much the open keys of a row say what others say: fp32 `[B, H, S]`, 0 where closed.

    The softmax of their mean cosines. Of the keys whose cosine with a key is above `alike`, the
    latest one is not counted as its copy; where there is none, the earliest open slot is not.
    """
    unit_BHSD = torch.nn.functional.normalize(key_BHSD.float(), dim=-1) * open_BHS[..., None]
    earliest_BH1 = position_BHS.masked_fill(~open_BHS, 2**62).argmin(-1, keepdim=True)
    total_BHS = torch.zeros_like(unit_BHSD[..., 0])
    for start in range(0, unit_BHSD.shape[2], _ROWS):
        part = slice(start, start + _ROWS)
        cosine_BHRS = unit_BHSD[:, :, part] @ unit_BHSD.mT
        cosine_BHRS.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
        close_BHRS = cosine_BHRS > alike
        place_BHRS = position_BHS[:, :, None].masked_fill(~close_BHRS, -1)
        latest_BHR = torch.where(close_BHRS.any(-1), place_BHRS.argmax(-1), earliest_BH1)
        cosine_BHRS.scatter_(3, latest_BHR[..., None], 0.0)
        total_BHS += cosine_BHRS.sum(2)
    mean_BHS = total_BHS / open_BHS.sum(-1, keepdim=True).clamp_min(1)
    return mean_BHS.masked_fill(~open_BHS, -torch.inf).softmax(-1).nan_to_num()
