"""One decode step of one layer: append a token, attend, observe, evict at most one slot a row."""

from __future__ import annotations

from typing import NamedTuple, get_args

from torch import Tensor

from kvpress.ops.operands import Bounds, Columns, Logits, Noise, Old, Pages, Token, schema
from kvpress.types import Rank

RANKS: tuple[Rank, ...] = get_args(Rank)


class Operands(NamedTuple):
    """The new token with its query, what a layer stores, and what may stay of it.

    `seen_B` counts the new token. evict: whether rows above their quotas lose a slot.
    """

    token: Token
    pages: Pages
    columns: Columns
    bounds: Bounds
    evict: bool
    noise: Noise
    logits: Logits
    old: Old = Old()


WRITES = ("key_PDS", "value_PSE", "counts_R", "position_PS", "mass_PS")
SCHEMA = schema("decode_step", Operands, "Tensor out_BN1E", writes=(*WRITES, "tensors"))


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    query_BN1D, _, value_BH1E = operands.token
    return query_BN1D.new_empty(*query_BN1D.shape[:3], value_BH1E.shape[3])
