"""Selection: which slots of a row stay. Protection is a mask, never a magic score."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.types import EMPTY, Rank


def ranking(rank: Rank, position_BHS: Tensor, mass_BHS: Tensor | None, seen_B: Tensor) -> Tensor:
    """The score of every slot by what is stored with it: fp32 `[B, H, S]`, larger stays longer.

    mass_per_age: the mass divided by the number of queries that could see the token.
    """
    if rank == "position":
        return position_BHS.float()
    if mass_BHS is None:
        raise LookupError(f"rank {rank!r} needs a mass: set `accumulates = True` in the policy.")
    if rank == "mass":
        return mass_BHS
    return mass_BHS / (seen_B[:, None, None] - position_BHS).clamp_min(1)


def protect(position_BHS: Tensor, seen_B: Tensor, sink_B: Tensor, recent_BH: Tensor) -> Tensor:
    """True for the slots of the first `sink` and the last `recent` tokens of each sequence."""
    first = (position_BHS >= 0) & (position_BHS < sink_B[:, None, None])
    last = position_BHS >= (seen_B[:, None] - recent_BH).clamp_min(0)[..., None]
    return first | last


def keep_top(
    score_BHS: Tensor, position_BHS: Tensor, protected_BHS: Tensor, keep_BH: Tensor
) -> Tensor:
    """True for the protected slots and the best others: `min(keep, stored)` slots of each row.

    Ties go to the lower position. Only an allocation below the protected tokens drops any of them,
    the lowest scores first.
    """
    # Stable sorts, least significant key first: position, score, class (protected, open, empty).
    order = position_BHS.argsort(dim=-1, stable=True)
    rank = score_BHS.float().gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, rank)
    group = torch.where(protected_BHS, 0, 1).masked_fill(position_BHS == EMPTY, 2)
    order = order.gather(-1, group.gather(-1, order).argsort(dim=-1, stable=True))
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (place < keep_BH[..., None]) & (position_BHS != EMPTY)


def kept_index(kept_BHS: Tensor, counts_BH: Tensor) -> Tensor:
    """The slot indices of the kept slots in ascending order, `[B, H, K]` with K the largest count.

    Entries beyond a row's count are arbitrary valid indices.
    """
    width = int(counts_BH.max()) if counts_BH.numel() else 0
    return kept_BHS.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]


def gather(column_BHSX: Tensor, index_BHK: Tensor) -> Tensor:
    """The slots at `index_BHK` of a dense column: `[B, H, K, ...]`."""
    extra = column_BHSX.shape[3:]
    index = index_BHK.view(*index_BHK.shape, *[1] * len(extra))
    return column_BHSX.gather(2, index.expand(*index_BHK.shape, *extra))


def matched(values_BHS: Tensor, position_BHS: Tensor, wanted_BHS: Tensor, missing: float) -> Tensor:
    """The values of the slots that hold the same positions, each in an order of its own.

    fp32, as `wanted_BHS`, which are positions too; `missing` where no slot holds one.
    """
    most = int(position_BHS.max()) + 2 if position_BHS.numel() else 1
    shape = (*values_BHS.shape[:2], most)
    by_position = torch.full(shape, missing, dtype=torch.float32, device=values_BHS.device)
    # Empty slots, of position -1, all come to place 0.
    by_position.scatter_(2, position_BHS + 1, values_BHS.float())
    by_position[..., 0] = missing
    known_BHS = wanted_BHS < most - 1
    place_BHS = (wanted_BHS + 1).where(known_BHS, 0)
    return by_position.gather(2, place_BHS)


def drop_one(score_BHS: Tensor, position_BHS: Tensor, protected_BHS: Tensor) -> Tensor:
    """The one slot of each row that `keep_top` would drop, found without sorting: int64 `[B, H]`.

    Every row must hold at least one unprotected slot. A score that is no number counts as the
    lowest: checking for it would make every step wait for the device.
    """
    open_BHS = ~protected_BHS & (position_BHS != EMPTY)
    score = score_BHS.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    score = score.masked_fill(~open_BHS, torch.inf)
    worst = open_BHS & (score == score.amin(-1, keepdim=True))
    return torch.where(worst, position_BHS, EMPTY).argmax(-1)
