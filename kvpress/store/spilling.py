"""Pages leave the device: those with a copy below at once, others as records of whole spans."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.store.session import TieredPages
from kvpress.store.spans import single, whole_spans
from kvpress.store.tiers.directory import NOWHERE


def spill(rows: TieredPages, least: int, every: bool) -> bool:
    """Sends pages to a lower tier, of at least so many bytes where there are as many.

    First those that were not chosen for the longest time and have a copy below, if every page may
    go; then whole spans, the last ones first. Where rows were compacted, pages of one span may be
    in several tiers: what is left of such spans on the device goes last, page by page. every: also
    what the last step chose; otherwise only pages without a copy, since `Shelf.thin` sees to the
    others. Returns whether something is left that could have gone. Raises TierError.
    """
    own, page_bytes = rows.shelf.directory, rows.shelf.page_bytes
    _, _, row_A, place_A, page_A, id_A = rows.used()
    may_A = own.at_P[id_A] != NOWHERE
    copied_A = own.record_P[id_A] != NOWHERE
    if every:
        least -= _leave(rows, id_A[may_A & copied_A], -(-least // page_bytes))
        if least <= 0:
            return True
    else:
        may_A &= own.idle_P[id_A]
    # Every step asks this of its rows, and mostly few are left: what follows looks at them alone.
    left_A = (may_A & ~copied_A).nonzero().flatten()
    left_A = left_A[_complete(rows, row_A[left_A], place_A[left_A])]
    if not len(left_A):
        return False
    may_A = torch.zeros_like(may_A).index_fill_(0, left_A, True)
    table = rows.paging.table
    groups = list(whole_spans(table, rows.span, row_A, place_A, may_A))
    beside_A = _beside(rows, row_A, place_A, may_A)
    mixed = list(whole_spans(table, rows.span, row_A, place_A, beside_A))
    for group in (*reversed(groups), *reversed(mixed)):
        if least <= 0:
            return True
        entry_A = group.entry_NP.flatten()
        # Beams may share pages, and one of a group may have gone with another one.
        now_A = may_A[entry_A] & (own.at_P[id_A[entry_A]] != NOWHERE)
        if not bool(now_A.all()):
            group, entry_A = single(group, now_A), entry_A[now_A]
        if len(entry_A):
            at_A = own.at_P[id_A[entry_A]].to(rows.like.device)
            positions = rows.positions(page_A[entry_A])
            rows.seal(group, id_A[group.entry_NP], rows.shelf.pages[at_A], positions)
            rows.shelf.leave(id_A[entry_A])
            least -= len(entry_A) * page_bytes
    return False


def _leave(rows: TieredPages, id_A: Tensor, most: int) -> int:
    """Frees the places of so many pages, those chosen longest ago; how many bytes that is."""
    if not len(id_A):
        return 0
    id_A = torch.unique(id_A)
    going_A = id_A[rows.shelf.directory.step_P[id_A].argsort(stable=True)[:most]]
    rows.shelf.leave(going_A)
    return len(going_A) * rows.shelf.page_bytes


def _complete(rows: TieredPages, row_A: Tensor, place_A: Tensor) -> Tensor:
    """Which pages are in spans of which none is missing: bool."""
    spans_R = rows.counts // rows.layout.slots // rows.span
    return place_A // rows.span < spans_R[row_A]


def _beside(rows: TieredPages, row_A: Tensor, place_A: Tensor, may_A: Tensor) -> Tensor:
    """Which pages are in a span of a sequence with one that may go: bool."""
    table = rows.paging.table
    group_A = place_A // rows.span * table.sequences + row_A // table.heads
    return torch.isin(group_A, torch.unique(group_A[may_A]))
