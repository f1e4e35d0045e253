"""Column sums of softmax attention over the queries of a prompt, without the P×S matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMA = (
    "attention_sums(Tensor query_BNPD, Tensor key_BHSD, Tensor position_BHS, float scaling, float"
    " softcap, int window, str noise, float tau, int seed, int layer, Tensor? map_BNX=None)"
    " -> Tensor sums_BNS"
)


def fake(query_BNPD: Tensor, key_BHSD: Tensor, *args: Any) -> Tensor:
    """An empty result of the right shape and dtype."""
    shape = (*query_BNPD.shape[:2], key_BHSD.shape[2])
    return key_BHSD.new_empty(shape, dtype=torch.float32)
