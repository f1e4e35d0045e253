"""Learned attention sinks: a logit s of every query head that takes part in each softmax.

With z the scaled logits of a query and lse = ln Σ exp(z_j), a token weighs exp(z_j) / (Σ exp(z) +
exp(s)): that is its weight without the sink times σ(lse − s). The sink's own weight is σ(s − lse),
and it adds nothing to the output. s is not scaled.

Where the LSE is at hand, outputs and weights are multiplied by σ(lse − s). Elsewhere a slot that is
stored nowhere stands before the others: its key gives every query the logit s, its value is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 8  # that queries and keys get for s: of two, heads are no longer aligned for a GPU
POSITION = 2**31 - 1  # of the slot of the sink: inside every sliding window
_MOST = 1e9  # of s / scaling: what is infinite would be NaN times 0


def with_slot(
    query_BNQD: Tensor, key_BHSD: Tensor, position_BHS: Tensor, sink_N: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with `CHANNELS` more, positions, and the slot of the sink in front.

    Queries get s / scaling in two channels, since half precision keeps 8 or 11 bits of a number:
    one rounded, one with the rest. Keys of tokens get zeros there, the sink's gets ones.
    """
    dtype, width = query_BNQD.dtype, query_BNQD.shape[-1]
    most = min(_MOST, torch.finfo(dtype).max / 4)
    logit_N = (sink_N.to(query_BNQD.device).float() / scaling).clamp(-most, most)
    high_N = logit_N.to(dtype)
    low_N = (logit_N - high_N.float()).to(dtype)
    parts_NC = F.pad(torch.stack([high_N, low_N], dim=-1), (0, CHANNELS - 2))
    parts_BNQC = parts_NC[:, None].expand(*query_BNQD.shape[:3], CHANNELS)
    key_BHXC = F.pad(key_BHSD, (0, CHANNELS, 1, 0))
    key_BHXC[:, :, 0, width : width + 2] = 1.0
    position_BHX = F.pad(position_BHS, (1, 0), value=POSITION)
    return torch.cat([query_BNQD, parts_BNQC], dim=-1), key_BHXC, position_BHX


def taken(
    found: tuple[Tensor, Tensor, Tensor | None], sink_N: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention output and weights of layers that may have sinks, from those without.

    found: output `[b, N, Q, E]`, LSE `[b, N, Q]` and, where they were asked for, weights. With a
    sink they get a column of its own weights, the first. A query that sees no token gets zeros.
    """
    out_bNQE, lse_bNQ, weights_bNQS = found
    if sink_N is None:
        return out_bNQE, weights_bNQS
    over_bNQ = lse_bNQ - sink_N.to(lse_bNQ.device).float()[:, None]
    nothing_bNQ = lse_bNQ == -torch.inf
    share_bNQ1 = over_bNQ.sigmoid().masked_fill(nothing_bNQ, 0.0)[..., None]
    out = (out_bNQE.float() * share_bNQ1).to(out_bNQE.dtype)
    if weights_bNQS is None:
        return out, None
    # Not 1 − share, which would have no digits left of what is small.
    own_bNQ1 = (-over_bNQ).sigmoid().masked_fill(nothing_bNQ, 1.0)[..., None]
    return out, torch.cat([own_bNQ1, weights_bNQS * share_bNQ1], dim=-1)


def with_sinks(lse_bN: Tensor, sink_N: Tensor) -> Tensor:
    """The LSE over tokens and the sink, from that over tokens."""
    return torch.logaddexp(lse_bN, sink_N.to(lse_bN.device).float().expand_as(lse_bN))
