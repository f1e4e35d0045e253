"""Pages that are chosen before the layer knows its queries: by what a head looks at, or others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.store.aging import PageAging, recent_slots
from kvpress.store.base import POSITION
from kvpress.store.chosen import Bounds, Chosen, Wanted, judged, rows_of, scored


def foreseen(
    bounds: Sequence[Bounds], wanted: Wanted, keeps: Sequence[Tensor]
) -> tuple[list[Chosen], int]:
    """The pages with the largest shares of a head's attention, and rows that chose by bounds.

    Those are rows of which less than `wanted.sure` is read. keeps: pages that rows may read.
    """
    both = list(zip(bounds, keeps, strict=True))
    found = [_by_head(own, wanted, keep_r) for own, keep_r in both]
    chosen = [some for some, _ in found]
    if not wanted.sure or not bounds:
        return chosen, 0
    unsure_r = 1 - torch.stack([left_r for _, left_r in found]).sum(0) < wanted.sure
    unsure = int(unsure_r.sum())
    if not unsure:
        return chosen, 0
    others = [own.choose(wanted, keep_r) for own, keep_r in both]
    return [some.but(unsure_r, x) for some, x in zip(chosen, others, strict=True)], unsure


def likely(aging: PageAging, wanted: Wanted) -> list[Chosen]:
    """What a step will choose, most likely: by a head where there is one."""
    return _by_queries(aging, wanted) if wanted.share_bHS is None else _by_heads(aging, wanted)


def _by_queries(aging: PageAging, wanted: Wanted) -> list[Chosen]:
    """What a step would choose that had these queries."""
    recent, parts = recent_slots(aging, wanted.sequences), aging.filled
    keeps = [wanted.keep(recent, part.layout.slots) for part in parts]
    bounds = judged(scored(parts, wanted), wanted, keeps)
    return [x.choose(wanted, keep_r).narrow() for x, keep_r in zip(bounds, keeps, strict=True)]


def _by_heads(aging: PageAging, wanted: Wanted) -> list[Chosen]:
    """What a head alone chooses, before there is a query."""
    recent, chosen = recent_slots(aging, wanted.sequences), []
    none_bNW = wanted.seen_b.new_empty(0, dtype=torch.float32)
    for number, part in enumerate(aging.filled):
        rows = rows_of(part, wanted.sequences)
        own = Bounds(part, number, *rows, none_bNW, none_bNW, 0)
        chosen.append(_by_head(own, wanted, wanted.keep(recent, own.slots))[0].narrow())
    return chosen


def _by_head(own: Bounds, wanted: Wanted, keep_r: Tensor) -> tuple[Chosen, Tensor]:
    """What a head chooses of a part, and the share of its attention that is left: fp32 `[r]`.

    Layers whose pages hold the same tokens choose the same: it is found out once for all of them.
    """
    memo = {} if POSITION in own.part.paging.columns else wanted.memo
    numbers = torch.cat([own.pages_r, keep_r, wanted.seen_b]).tolist() if memo is not None else []
    key = (own.table_rW.device, own.slots, own.table_rW.shape[1], *numbers)
    if memo and key in memo:
        place_rW, pages_r, left_r = memo[key]
        return Chosen(own.part, own.number, place_rW, pages_r), left_r
    share_bHW = _share_of_pages(own, wanted)
    chosen = own.ranked(share_bHW).choose(wanted, keep_r)
    left_r = _left(share_bHW, chosen)
    if memo is not None:
        memo[key] = (chosen.place_rW, chosen.pages_r, left_r)
    return chosen, left_r


def _share_of_pages(own: Bounds, wanted: Wanted) -> Tensor:
    """What a head's attention at the slots of every page comes to: fp32 `[b, H, W]`."""
    assert wanted.share_bHS is not None, "a head looked"
    batch, heads, tokens = wanted.share_bHS.shape
    share_rS = wanted.share_bHS.flatten(0, 1)
    width = own.table_rW.shape[1]
    if POSITION in own.part.paging.columns:  # some tokens are gone, others lie in any order
        position_rS = own.part.paging.pages(POSITION)[own.table_rW.long()].flatten(1).long()
        there_rS = (position_rS >= 0) & (position_rS < tokens)
        share_rS = share_rS.gather(1, position_rS.clamp(0, tokens - 1)) * there_rS
    else:  # old slots are the first tokens
        share_rS = torch.nn.functional.pad(share_rS, (0, max(0, width * own.slots - tokens)))
        share_rS = share_rS[:, : width * own.slots]
    return share_rS.view(batch, heads, width, own.slots).sum(-1)


def _left(share_bHW: Tensor, chosen: Chosen) -> Tensor:
    """What is left of all pages of rows without those chosen: fp32 `[r]`."""
    share_rW, place_rW = share_bHW.flatten(0, 1), chosen.place_rW
    read_rW = share_rW.gather(1, place_rW.long().clamp_min(0)) * (place_rW >= 0)
    return share_rW.sum(1) - read_rW.sum(1)
