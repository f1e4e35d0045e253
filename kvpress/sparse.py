"""Block-sparse attention of a prompt: quantise, estimate which blocks matter, compute those.

Source: arXiv 2505.24179. Queries and keys are smoothed by their means and quantised to 4 bits; a
block is computed if one of its estimated logits exceeds ln τ + LSE, where the LSE is exact, over
the first block and the local area of the query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.blocks import MOST_CODE, SLOTS, Blocks, computed_blocks, of_slots, to_map

_ROWS = 16  # queries of a tile, of which r and r + 8 share a scale


class Sparsity(NamedTuple):
    """How a policy wants a prompt's attention to be made sparse.

    threshold: relative attention score τ above which a block is computed, of all heads; None: that
    of every head in a calibration. calibration: its file; None: one that ships for the model.
    local: slots before a query block that are always computed, at least. least: new tokens below
    which attention stays dense; None: calibrated.
    """

    threshold: float | None
    calibration: str | None
    local: int
    least: int | None


class Thresholds(NamedTuple):
    """What a `Sparsity` comes to for one model: τ of layer and query head, 0 for a dense head."""

    tau_LN: Tensor  # fp32, on the host
    local: int
    least: int


class Codes(NamedTuple):
    """Smoothed queries or keys in 4 bits: x ≈ code · scale + mean."""

    code: Tensor  # int8
    scale: Tensor  # fp32: of queries [B, N, P], of keys [B, H, J, 4]
    smooth: Tensor  # fp32, of the shape of the codes: x − mean
    mean: Tensor  # fp32 [B, N or H, 1, D]


def quantise_queries(query_BNPD: Tensor) -> Codes:
    """Codes of queries; rows r and r + 8 of 16 share a scale."""
    smooth_BNPD, mean_BN1D = _smooth(query_BNPD)
    most_BNR = _largest(smooth_BNPD, _ROWS)
    most_BNt2g = most_BNR.view(*most_BNR.shape[:2], -1, 2, _ROWS // 2)
    scale_BNtg = _scale(most_BNt2g.amax(3))
    scale_BNP = scale_BNtg.repeat(1, 1, 1, 2).flatten(2)[..., : query_BNPD.shape[2]].contiguous()
    return Codes(_codes(smooth_BNPD, scale_BNP[..., None]), scale_BNP, smooth_BNPD, mean_BN1D)


def quantise_keys(key_BHSD: Tensor) -> Codes:
    """Codes of keys; those of a block whose number mod 8 is 2j or 2j + 1 share a scale."""
    smooth_BHSD, mean_BH1D = _smooth(key_BHSD)
    most_BHR = _largest(smooth_BHSD, SLOTS)
    most_BHJoK2 = most_BHR.view(*most_BHR.shape[:2], -1, SLOTS // 8, 4, 2)
    scale_BHJK = _scale(most_BHJoK2.amax((3, 5)))
    codes_BHSD = _codes(smooth_BHSD, of_slots(scale_BHJK, key_BHSD.shape[2])[..., None])
    return Codes(codes_BHSD, scale_BHJK, smooth_BHSD, mean_BH1D)


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


def sparse_attention(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    value_BHSE: Tensor,
    scaling: float,
    tau_N: Tensor,
    local: int,
) -> tuple[Tensor, Tensor]:
    """Attention `[B, N, P, E]` of the last P slots' queries, and the blocks computed `[B, N]`."""
    map_BNX = block_map(query_BNPD, key_BHSD, scaling, tau_N, local)
    out_BNPE, _ = ops.attend_blocks(query_BNPD, key_BHSD, value_BHSE, map_BNX, scaling)
    return out_BNPE, computed_blocks(map_BNX)


def block_map(
    query_BNPD: Tensor, key_BHSD: Tensor, scaling: float, tau_N: Tensor, local: int
) -> Tensor:
    """The bit map of blocks to compute: uint8 `[B, N, X]`, see blocks.py."""
    keys, own = quantise_keys(key_BHSD), quantise_queries(query_BNPD)
    bound_BNP = thresholds(query_BNPD, key_BHSD, keys.mean, scaling, tau_N, local)
    shift_BNS = lost_by_smoothing(own.mean, keys)
    return ops.estimate_blocks(
        own.code, own.scale, keys.code, keys.scale, shift_BNS, bound_BNP, local
    )


def thresholds(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    mean_BH1D: Tensor,
    scaling: float,
    tau_N: Tensor,
    local: int,
) -> Tensor:
    """The least q · k' that counts, of every query: fp32 `[B, N, P]`.

    With l = Σ exp(σ q·k') over the first block and the local area, exact, and keys less their mean:
    exp(σ q·k') / l > τ is q·k' > (ln τ + ln l) / σ.
    """
    batch, heads, queries, _ = query_BNPD.shape
    blocks = Blocks(queries, key_BHSD.shape[2])
    always_BNIJ = blocks.always(local, query_BNPD.device).expand(batch, heads, -1, -1)
    always_BNX = to_map(always_BNIJ, blocks)
    _, lse_BNP = ops.attend_blocks(query_BNPD, key_BHSD, key_BHSD[..., :0], always_BNX, scaling)
    # This LSE is that of whole keys: that of smoothed ones lacks q · k̄.
    moved_BNP = _products(query_BNPD.float(), mean_BH1D).view(batch, heads, queries)
    tau_N1 = tau_N.to(lse_BNP.device)[:, None]
    return ((lse_BNP + tau_N1.log()) / scaling - moved_BNP).contiguous()


def lost_by_smoothing(mean_BN1D: Tensor, keys: Codes) -> Tensor:
    """q̄ · k' in units of the scale of each key: what smoothing the queries took from logits."""
    own_BHGS = _products(mean_BN1D, keys.smooth)
    own_BHGS /= of_slots(keys.scale, own_BHGS.shape[-1])[:, :, None]
    return own_BHGS.flatten(1, 2)


def _products(query_BNPD: Tensor, key_BHSD: Tensor) -> Tensor:
    """q · k of every query head and the keys of its group: fp32 `[B, H, G·P, S]`."""
    batch, heads, _, width = key_BHSD.shape
    return query_BNPD.reshape(batch, heads, -1, width) @ key_BHSD.mT
