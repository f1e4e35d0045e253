"""PyTorch reference of `match_keys`: cosines of a block of evicted keys at a time."""

from __future__ import annotations

import torch
from kvpress.csrc.match_keys import Operands
from torch import Tensor

from kvpress.ops import shapes

BLOCK_ELEMENTS = 1 << 20  # cosines per block: 4 MiB


def match_keys(operands: Operands) -> tuple[Tensor, Tensor]:
    """The largest cosine of each evicted key with an allowed kept key, and that key's index.

    fp32 and int64, `[B, H, E]`; -inf and -1 where there is none. Keys of norm 0 have cosine 0 with
    all keys; keys whose norm is not finite match none. Of equal cosines the lowest index is taken.
    Raises OperatorError.
    """
    evicted_BHED, kept_BHCD, allowed_BHC = operands
    check(operands)
    batch, heads, evicted, _ = evicted_BHED.shape
    shape, kept = (batch, heads, evicted), kept_BHCD.shape[2]
    similarity_BHE = torch.full(shape, -torch.inf, device=evicted_BHED.device, dtype=torch.float32)
    target_BHE = torch.full(shape, -1, dtype=torch.int64, device=evicted_BHED.device)
    if not kept:
        return similarity_BHE, target_BHE
    unit_BHCD = unit(kept_BHCD)
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * kept))
    for start in range(0, evicted, step):
        block = slice(start, start + step)
        cosine_BHeC = unit(evicted_BHED[:, :, block]) @ unit_BHCD.mT
        never_BHeC = ~allowed_BHC[:, :, None] | cosine_BHeC.isnan()
        largest_BHe, index_BHe = cosine_BHeC.masked_fill_(never_BHeC, -torch.inf).max(-1)
        similarity_BHE[:, :, block] = largest_BHe
        target_BHE[:, :, block] = index_BHe.masked_fill_(largest_BHe == -torch.inf, -1)
    return similarity_BHE, target_BHE


def unit(key_BHSD: Tensor) -> Tensor:
    """Keys of norm 1 in fp32: zeros where the norm is 0, NaN where it is not finite."""
    key_BHSD = key_BHSD.float()
    norm_BHS1 = key_BHSD.square().sum(-1, keepdim=True).sqrt()
    factor_BHS1 = norm_BHS1.reciprocal().masked_fill_(norm_BHS1 == 0, 0)
    return key_BHSD * factor_BHS1.masked_fill_(norm_BHS1 == torch.inf, torch.nan)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "match_keys"
    evicted_BHED, kept_BHCD, allowed_BHC = operands
    named = {"evicted_BHED": evicted_BHED, "kept_BHCD": kept_BHCD}
    lengths = shapes.bind(op, {**named, "allowed_BHC": allowed_BHC})
    shapes.floating(op, named)
    if kept_BHCD.dtype != evicted_BHED.dtype:
        shapes.refuse(op, f"kept_BHCD is {kept_BHCD.dtype}; it must be {evicted_BHED.dtype}")
    if allowed_BHC.dtype != torch.bool:
        shapes.refuse(op, f"allowed_BHC is {allowed_BHC.dtype}; it must be torch.bool")
    shapes.at_least_one(op, lengths, "D")
    shapes.at_most(op, lengths, "D", shapes.MOST_WIDTH)
    shapes.at_most(op, lengths, "EC", shapes.MOST_SLOTS)
