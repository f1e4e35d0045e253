"""The nearest kept key by cosine for every evicted key, without the E×C matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.ops.operands import schema


class Operands(NamedTuple):
    """allowed_BHC: bool, the kept keys that may be matched."""

    evicted_BHED: Tensor
    kept_BHCD: Tensor
    allowed_BHC: Tensor


SCHEMA = schema("match_keys", Operands, "(Tensor similarity_BHE, Tensor target_BHE)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtypes."""
    shape = operands.evicted_BHED.shape[:3]
    similarity_BHE = operands.evicted_BHED.new_empty(shape, dtype=torch.float32)
    return similarity_BHE, operands.evicted_BHED.new_empty(shape, dtype=torch.int64)
