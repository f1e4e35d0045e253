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
    evicted_BHVD, kept_BHKD, allowed_BHK = operands
    check(operands)
    batch, heads, evicted, _ = evicted_BHVD.shape
    shape, kept = (batch, heads, evicted), kept_BHKD.shape[2]
    similarity_BHV = torch.full(shape, -torch.inf, device=evicted_BHVD.device, dtype=torch.float32)
    target_BHV = torch.full(shape, -1, dtype=torch.int64, device=evicted_BHVD.device)
    if not kept:
        return similarity_BHV, target_BHV
    unit_BHKD = unit(kept_BHKD)
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * kept))
    for start in range(0, evicted, step):
        block = slice(start, start + step)
        cosine_BHvK = unit(evicted_BHVD[:, :, block]) @ unit_BHKD.mT
        never_BHvK = ~allowed_BHK[:, :, None] | cosine_BHvK.isnan()
        largest_BHv, index_BHv = cosine_BHvK.masked_fill_(never_BHvK, -torch.inf).max(-1)
        similarity_BHV[:, :, block] = largest_BHv
        target_BHV[:, :, block] = index_BHv.masked_fill_(largest_BHv == -torch.inf, -1)
    return similarity_BHV, target_BHV


def unit(key_BHSD: Tensor) -> Tensor:
    """Keys of norm 1 in fp32: zeros where the norm is 0, NaN where it is not finite."""
    key_BHSD = key_BHSD.float()
    norm_BHS1 = key_BHSD.square().sum(-1, keepdim=True).sqrt()
    factor_BHS1 = norm_BHS1.reciprocal().masked_fill_(norm_BHS1 == 0, 0)
    return key_BHSD * factor_BHS1.masked_fill_(norm_BHS1 == torch.inf, torch.nan)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "match_keys"
    evicted_BHVD, kept_BHKD, allowed_BHK = operands
    named = {"evicted_BHVD": evicted_BHVD, "kept_BHKD": kept_BHKD}
    lengths = shapes.bind(op, {**named, "allowed_BHK": allowed_BHK})
    shapes.floating(op, named)
    if kept_BHKD.dtype != evicted_BHVD.dtype:
        shapes.refuse(op, f"kept_BHKD is {kept_BHKD.dtype}; it must be {evicted_BHVD.dtype}")
    if allowed_BHK.dtype != torch.bool:
        shapes.refuse(op, f"allowed_BHK is {allowed_BHK.dtype}; it must be torch.bool")
    shapes.at_least_one(op, lengths, "D")
    shapes.at_most(op, lengths, "D", shapes.MOST_WIDTH)
    shapes.at_most(op, lengths, "VK", shapes.MOST_SLOTS)
