"""ALiBi: a bias by distance, as channels of queries and keys (Press et al., arXiv 2108.12409).

Softmax does not change when a number is added to all scores of a query, so that slope · position
of the key is as good as slope · distance. Keys carry their position and queries their slope, and no
kernel needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.run import Tokens

CHANNELS = 2  # a position as 256·a + b: half precision holds integers up to 256 exactly
_BASE = 256


def with_positions(
    tokens: Tokens, slopes: Sequence[float], seen_B: Tensor, valid_BP: Tensor | None
) -> Tokens:
    """The tokens with `CHANNELS` more channels in queries and keys.

    slopes: of every query head, on scaled scores. seen_B: real tokens before these, on the host.
    """
    query_BNPD, key_BHPD = tokens.query_bNPD, tokens.key_bHPD
    batch, query_heads, new, _ = query_BNPD.shape
    offset_BP = host.arange(new)[None] if valid_BP is None else valid_BP.cumsum(1) - 1
    position_BP = (seen_B[:, None] + offset_BP).clamp_min(0)
    parts_BPC = torch.stack([position_BP // _BASE, position_BP % _BASE], dim=-1)
    parts_B1PC = parts_BPC[:, None].to(key_BHPD)
    slope_N = host.tensor(slopes, dtype=torch.float64) / tokens.scaling
    slope_NC = torch.stack([slope_N * _BASE, slope_N], dim=-1).to(query_BNPD)
    query = slope_NC[None, :, None].expand(batch, query_heads, new, CHANNELS)
    key = parts_B1PC.expand(batch, key_BHPD.shape[1], new, CHANNELS)
    return tokens._replace(
        query_bNPD=torch.cat([query_BNPD, query], dim=-1),
        key_bHPD=torch.cat([key_BHPD, key], dim=-1),
    )
