"""Which blocks of a prompt's attention matter, estimated from 4-bit queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.block_map import Blocks
from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """Codes int8 with fp32 steps, shifts and thresholds; see README.md. local: slots, at least."""

    query_BNQD: Tensor
    query_scale_BNQ: Tensor
    key_BHSD: Tensor
    key_scale_BHJ4: Tensor
    shift_BNS: Tensor
    threshold_BNQ: Tensor
    local: int


SCHEMA = schema("estimate_blocks", Operands, "Tensor map_BNX")


def fake(operands: Operands) -> Tensor:
    """An empty map of the right shape."""
    query_BNQD = operands.query_BNQD
    blocks = Blocks(query_BNQD.shape[2], operands.key_BHSD.shape[2])
    shape = (*query_BNQD.shape[:2], blocks.offsets[-1])
    return query_BNQD.new_empty(shape, dtype=torch.uint8)
