"""Column sums, or maxima, of softmax attention over the queries of a prompt, without the matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.ops.operands import Logits, Noise, Reduction, schema


class Operands(NamedTuple):
    """The Q queries belong to the last Q of S slots, in order; the last `window` are reduced.

    position_BHS: int64, EMPTY where there is no token. map_BNX: the blocks that are attended to.
    """

    query_BNQD: Tensor
    key_BHSD: Tensor
    position_BHS: Tensor
    logits: Logits
    reduction: Reduction
    noise: Noise
    map_BNX: Tensor | None = None


SCHEMA = schema("attention_sums", Operands, "Tensor sums_BNS")


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    query_BNQD, key_BHSD = operands[:2]
    shape = (*query_BNQD.shape[:2], key_BHSD.shape[2])
    return key_BHSD.new_empty(shape, dtype=torch.float32)
