"""Attention of a decode step over those stored pages whose bounds say that they matter.

The slots that are not in whole pages yet are always read. What was left out is bounded: with b the
sum of the exponentials that the other pages can hold at the most, and z that of all that was read,
no query head missed a larger share of its attention than b / (z + b).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvpress.store.aging import PageAging, recent_slots, slot_bytes
from kvpress.store.chosen import Bounds, Chosen, Wanted, judged, scored
from kvpress.store.foreseen import foreseen
from kvpress.store.found import Found, share_missed
from kvpress.store.packed import PackedRows
from kvpress.store.top import attend_top
from kvpress.store.trees import Trees

# Output, LSE `[b, N]` and, where asked for, dense weights of a query over recent slots and pages.
Attend: TypeAlias = Callable[[Sequence[Chosen], bool], tuple[Tensor, Tensor, Tensor | None]]


def attend_some(
    aging: PageAging, wanted: Wanted, attend: Attend, trees: Trees
) -> tuple[Tensor, Tensor | None, Found]:
    """Attention output, weights where asked for, and what was read.

    wanted: a tree where one is allowed. attend: to chosen pages.
    """
    if wanted.top is not None:
        return attend_top(aging, wanted)
    parts, recent = aging.filled, recent_slots(aging, wanted.sequences)
    short = unsure = 0
    keeps = [wanted.keep(recent, part.layout.slots) for part in parts]
    if wanted.tree:
        bounds, chosen = _searched(wanted, parts, keeps, trees)
    else:
        bounds = judged(scored(parts, wanted), wanted, keeps)
        if wanted.mass is not None and bounds:
            keeps, short = _certify(wanted, bounds, keeps, attend)
        if wanted.share_bHS is None:
            chosen = [own.choose(wanted, keep_r) for own, keep_r in zip(bounds, keeps, strict=True)]
        else:
            chosen, unsure = foreseen(bounds, wanted, keeps)
    out, lse_bN, weights = attend(chosen, wanted.need_weights)
    looked = [own.looked for own in bounds]
    if wanted.earlier_bND is not None:
        wanted = wanted.by_now()
        bounds = scored(parts, wanted)
    missed = _missed(wanted, bounds, chosen, lse_bN)
    each = slot_bytes(aging)
    found = Found(out, lse_bN, *missed, recent, each, chosen, looked, short, unsure=unsure)
    return out, weights, found


def _searched(
    wanted: Wanted, parts: Sequence[PackedRows], keeps: Sequence[Tensor], trees: Trees
) -> tuple[list[Bounds], list[Chosen]]:
    """Bounds of all pages, and what a scan would choose.

    Only what a search names may be judged or read: other bounds may be those of larger boxes.
    """
    bounds, chosen = [], []
    for number, (part, keep_r) in enumerate(zip(parts, keeps, strict=True)):
        most_r = wanted.candidate(keep_r) if wanted.cells else keep_r
        own, some = trees.search(number, part, wanted, most_r)
        if wanted.cells:
            own = own.judged(wanted, some)
            some = own.choose(wanted, keep_r)
        bounds.append(own)
        chosen.append(some)
    return bounds, chosen


def _missed(
    wanted: Wanted, bounds: Sequence[Bounds], chosen: Sequence[Chosen], lse_bN: Tensor
) -> tuple[Tensor, Tensor]:
    """What all parts missed: see `Found`."""
    found = [own.missed(wanted, some) for own, some in zip(bounds, chosen, strict=True)]
    if not found:
        return torch.full_like(lse_bN, -torch.inf), lse_bN.new_zeros(len(wanted.slots))
    mass_bN, length_r = found[0]
    for more_bN, longer_r in found[1:]:
        mass_bN = torch.logaddexp(mass_bN, more_bN)
        length_r = torch.maximum(length_r, longer_r)
    return mass_bN, length_r


def _certify(
    wanted: Wanted, bounds: Sequence[Bounds], most: list[Tensor], attend: Attend
) -> tuple[list[Tensor], int]:
    """The fewest pages of each row with which no query head misses more than `wanted.mass`.

    most: never more. A row has pages in one part, so that one number does for all parts. Returns
    what to keep in each part, and how many rows are not certified with that.
    """
    least = wanted.mass
    assert least is not None, "it was asked for"
    high_r = torch.stack(
        [torch.minimum(keep_r, own.pages_r) for own, keep_r in zip(bounds, most, strict=True)]
    ).amax(0)
    low_r, step = torch.full_like(high_r, -1), 1

    def certified(keep_r: Tensor) -> Tensor:
        chosen = [own.choose(wanted, keep_r) for own in bounds]
        lse_bN = attend(chosen, False)[1]
        mass_bN, _ = _missed(wanted, bounds, chosen, lse_bN)
        error_bN = share_missed(mass_bN, lse_bN, chosen)
        return (error_bN.view(len(keep_r), -1) <= least).all(1)

    # First by steps that double, then by halves: what is read grows with what it comes to.
    tried_r, known_r = torch.zeros_like(high_r), torch.zeros_like(high_r, dtype=torch.bool)
    while bool((low_r + 1 < high_r).any()):
        found_r = certified(tried_r)
        high_r = torch.where(found_r, torch.minimum(high_r, tried_r), high_r)
        low_r = torch.where(found_r, low_r, torch.maximum(low_r, tried_r))
        known_r = known_r | found_r
        middle_r = (low_r + high_r + 1) // 2
        tried_r = torch.minimum(torch.where(known_r, middle_r, low_r + step), high_r)
        step *= 2
    short = int((~certified(high_r)).sum())
    return [high_r] * len(bounds), short
