"""4-bit codes of queries and keys, by which blocks of attention are estimated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.block_map import MOST_CODE, SLOTS, of_slots

_ROWS = 16  # queries of a tile, of which r and r + 8 share a scale


class Codes(NamedTuple):
    """Smoothed queries or keys in 4 bits: x ≈ code · scale + mean."""

    code: Tensor  # int8
    scale: Tensor  # fp32: of queries [B, N, Q], of keys [B, H, J, 4]
    smooth: Tensor  # fp32, of the shape of the codes: x − mean
    mean: Tensor  # fp32 [B, N or H, 1, D]


def quantise_queries(query_BNQD: Tensor) -> Codes:
    """Codes of queries; rows r and r + 8 of 16 share a scale."""
    smooth_BNQD, mean_BN1D = _smooth(query_BNQD)
    most_BNR = _largest(smooth_BNQD, _ROWS)
    most_BNt2g = most_BNR.view(*most_BNR.shape[:2], -1, 2, _ROWS // 2)
    scale_BNtg = _scale(most_BNt2g.amax(3))
    scale_BNQ = scale_BNtg.repeat(1, 1, 1, 2).flatten(2)[..., : query_BNQD.shape[2]].contiguous()
    return Codes(_codes(smooth_BNQD, scale_BNQ[..., None]), scale_BNQ, smooth_BNQD, mean_BN1D)


def quantise_keys(key_BHSD: Tensor) -> Codes:
    """Codes of keys; those of a block whose number mod 8 is 2j or 2j + 1 share a scale."""
    smooth_BHSD, mean_BH1D = _smooth(key_BHSD)
    most_BHR = _largest(smooth_BHSD, SLOTS)
    most_BHJs42 = most_BHR.view(*most_BHR.shape[:2], -1, SLOTS // 8, 4, 2)
    scale_BHJ4 = _scale(most_BHJs42.amax((3, 5)))
    codes_BHSD = _codes(smooth_BHSD, of_slots(scale_BHJ4, key_BHSD.shape[2])[..., None])
    return Codes(codes_BHSD, scale_BHJ4, smooth_BHSD, mean_BH1D)


def _largest(x_BNSD: Tensor, multiple: int) -> Tensor:
    """The largest |number| of every row, and 0 for rows up to a multiple: `[B, N, rows]`."""
    most_BNS = torch.maximum(x_BNSD.amax(-1), -x_BNSD.amin(-1))
    return torch.nn.functional.pad(most_BNS, (0, -most_BNS.shape[-1] % multiple))


def _smooth(x_BNSD: Tensor) -> tuple[Tensor, Tensor]:
    x_BNSD = x_BNSD.float()
    mean_BN1D = x_BNSD.mean(2, keepdim=True)
    return x_BNSD - mean_BN1D, mean_BN1D


def _scale(most: Tensor) -> Tensor:
    """The step that reaches the largest number; 1 where all numbers are 0."""
    return torch.where(most > 0, most / MOST_CODE, 1.0).contiguous()


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round_().clamp_(-MOST_CODE, MOST_CODE).to(torch.int8).contiguous()
