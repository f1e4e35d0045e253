"""How much each key channel contributes to the logits of some queries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Some queries, keys, and which slots are held: bool."""

    query_BNQD: Tensor
    key_BHSD: Tensor
    held_BHS: Tensor


SCHEMA = schema("channel_scores", Operands, "Tensor score_BHD")


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    batch, heads, _, width = operands.key_BHSD.shape
    return operands.query_BNQD.float().new_empty(batch, heads, width)
