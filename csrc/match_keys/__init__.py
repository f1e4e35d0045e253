"""The nearest kept key by cosine for every evicted key, without the E×C matrix."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = (
    "match_keys(Tensor evicted_BHED, Tensor kept_BHCD, Tensor allowed_BHC)"
    " -> (Tensor similarity_BHE, Tensor target_BHE)"
)


def fake(evicted_BHED: Tensor, kept_BHCD: Tensor, allowed_BHC: Tensor) -> tuple[Tensor, Tensor]:
    """Empty results of the right shape and dtypes."""
    shape = evicted_BHED.shape[:3]
    similarity_BHE = evicted_BHED.new_empty(shape, dtype=torch.float32)
    return similarity_BHE, evicted_BHED.new_empty(shape, dtype=torch.int64)
