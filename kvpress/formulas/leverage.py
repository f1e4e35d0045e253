"""How much a key stands for a direction of its own, and what a block's own queries give to it
(Chari et al., arXiv 2507.08143)."""

from __future__ import annotations

import torch
from torch import Tensor


def leverage(key_BHSD: Tensor, held_BHS: Tensor, ridge: float) -> Tensor:
    """Leverage scores of the keys of each row: fp32 `[B, H, S]`, 0 where there is no slot.

    l_j = x_j (XᵀX + λ)⁻¹ x_jᵀ with X the keys minus their mean and λ = ridge · tr(XᵀX) / D. Their
    sum is the rank of X where λ is 0, which needs keys of full rank.
    """
    held_BHS1 = held_BHS[..., None]
    count_BH11 = held_BHS.sum(-1)[..., None, None].clamp_min(1)
    key_BHSD = key_BHSD.double().where(held_BHS1, 0.0)
    apart_BHSD = (key_BHSD - key_BHSD.sum(2, keepdim=True) / count_BH11).where(held_BHS1, 0.0)
    square_BHDD = apart_BHSD.mT @ apart_BHSD
    diagonal_BHD = square_BHDD.diagonal(dim1=-2, dim2=-1)
    # A row of equal keys has no direction at all: then every leverage is 0.
    mean_BH1 = diagonal_BHD.mean(-1, keepdim=True)
    diagonal_BHD.add_((ridge * mean_BH1).where(mean_BH1 > 0, 1.0))
    solved_BHDS = torch.linalg.solve(square_BHDD, apart_BHSD.mT)
    found_BHS: Tensor = (apart_BHSD * solved_BHDS.mT).sum(-1).float()
    return found_BHS


def within_blocks(
    query_BNQD: Tensor, key_BHQD: Tensor, scaling: float, softcap: float, block: int
) -> Tensor:
    """What the queries of each block give to its keys, later ones too: fp32 `[B, H, Q]`.

    Softmax over the block, summed over its queries, averaged over the query group.
    """
    batch, heads, tokens, width = key_BHQD.shape
    query_BHGQD = query_BNQD.float().reshape(batch, heads, -1, tokens, width)
    key_BH1QD, made = key_BHQD.float()[:, :, None], []
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        logits = query_BHGQD[..., part, :] @ key_BH1QD[..., part, :].mT * scaling
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        made.append(logits.softmax(-1).sum(-2).mean(2))
    return torch.cat(made, dim=-1)


def standard(score_BHS: Tensor, held_BHS: Tensor) -> Tensor:
    """Scores of mean 0 and variance 1 over the slots of each row."""
    count_BH1 = held_BHS.sum(-1, keepdim=True).clamp_min(1)
    mean_BH1 = score_BHS.where(held_BHS, 0.0).sum(-1, keepdim=True) / count_BH1
    apart_BHS = (score_BHS - mean_BH1).where(held_BHS, 0.0)
    variance_BH1 = apart_BHS.square().sum(-1, keepdim=True) / count_BH1
    return apart_BHS / variance_BH1.sqrt().clamp_min(1e-12)
