"""Which blocks of a prompt's attention matter, estimated from 4-bit queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.formulas.block_map import Blocks

SCHEMA = (
    "estimate_blocks(Tensor query_BNPD, Tensor query_scale_BNP, Tensor key_BHSD, Tensor"
    " key_scale_BHJK, Tensor shift_BNS, Tensor threshold_BNP, int local) -> Tensor map_BNX"
)


def fake(query_BNPD: Tensor, query_scale_BNP: Tensor, key_BHSD: Tensor, *args: Any) -> Tensor:
    """An empty map of the right shape."""
    blocks = Blocks(query_BNPD.shape[2], key_BHSD.shape[2])
    shape = (*query_BNPD.shape[:2], blocks.offsets[-1])
    return query_BNPD.new_empty(shape, dtype=torch.uint8)
