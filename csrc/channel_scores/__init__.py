"""How much each key channel contributes to the logits of some queries."""

from __future__ import annotations

from torch import Tensor

SCHEMA = "channel_scores(Tensor query_BNWD, Tensor key_BHSD, Tensor held_BHS) -> Tensor score_BHD"


def fake(query_BNWD: Tensor, key_BHSD: Tensor, held_BHS: Tensor) -> Tensor:
    """An empty result of the right shape and dtype."""
    batch, heads, _, width = key_BHSD.shape
    return query_BNWD.float().new_empty(batch, heads, width)
