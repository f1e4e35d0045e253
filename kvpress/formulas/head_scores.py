"""How much a retrieval head looks at each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(
    query_BND: Tensor, key_BHSD: Tensor, group: int, valid_BXS: Tensor | None = None
) -> Tensor:
    """How much a head looks at each token: fp32 `[B, H, S]`, the largest over its query heads.

    The softmax of q·k / √D over the tokens that are valid, then the maximum over the query heads of
    a group (arXiv 2512.00722, section 4, GQA). valid_BXS: bool, X = 1 or H; what is not valid
    scores 0, and so does everything where nothing is.
    """
    batch, heads, _, width = key_BHSD.shape
    query_BHGD = query_BND.float().view(batch, heads, group, width) / math.sqrt(width)
    logit_BHGS = query_BHGD @ key_BHSD.float().transpose(-1, -2)
    if valid_BXS is not None:
        logit_BHGS = logit_BHGS.masked_fill(~valid_BXS[:, :, None], -torch.inf)
    weight_BHGS: Tensor = logit_BHGS.softmax(-1)
    if valid_BXS is not None:  # a softmax over nothing is NaN
        weight_BHGS = weight_BHGS.masked_fill(~valid_BXS[:, :, None], 0.0)
    return weight_BHGS.amax(2)
