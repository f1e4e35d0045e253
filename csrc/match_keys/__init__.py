"""The nearest kept key by cosine for every evicted key, without the E×C matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """allowed_BHK: bool, the kept keys that may be matched."""

    evicted_BHVD: Tensor
    kept_BHKD: Tensor
    allowed_BHK: Tensor


SCHEMA = schema("match_keys", Operands, "(Tensor similarity_BHV, Tensor target_BHV)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtypes."""
    shape = operands.evicted_BHVD.shape[:3]
    similarity_BHV = operands.evicted_BHVD.new_empty(shape, dtype=torch.float32)
    return similarity_BHV, operands.evicted_BHVD.new_empty(shape, dtype=torch.int64)
