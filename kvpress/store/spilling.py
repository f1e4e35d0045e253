"""Pages leave the device: those with a copy below at once, others as records of whole spans."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.session import TieredPages, Whole
from kvpress.store.tiered_memory import used_pages
from kvpress.store.tiers.directory import NOWHERE


def spill(rows: TieredPages, least: int, every: bool) -> bool:
    """Sends pages to a lower tier, of at least so many bytes where there are as many.

    First those that were not chosen for the longest time and have a copy below, then whole spans,
    the last ones first. Where rows were compacted, pages of one span may be in several tiers: what
    is left of such spans on the device goes last, page by page. every: also what the last step
    chose. Returns whether something is left that could have gone. Raises TierError.
    """
    own, page_bytes = rows.shelf.directory, rows.shelf.page_bytes
    id_A = rows.ids_in_use()
    may_A = (own.at_P[id_A] != NOWHERE) & (every | (own.step_P[id_A] < rows.last))
    copied_A = own.record_P[id_A] != NOWHERE
    least -= _leave(rows, torch.unique(id_A[may_A & copied_A]), -(-least // page_bytes))
    if least <= 0:
        return True
    row_A, place_A = used_pages(rows.paging.table).nonzero().unbind(1)
    may_A &= ~copied_A & _complete(rows, row_A, place_A)
    if not bool(may_A.any()):
        return False
    page_A = rows.paging.table.pages_RW[row_A, place_A].long()
    groups = list(rows.whole(row_A, place_A, may_A))
    mixed = list(rows.whole(row_A, place_A, _beside(rows, row_A, place_A, may_A)))
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


def single(group: Whole, chosen_A: Tensor | None = None) -> Whole:
    """The pages of a span, or some of them, each as a slice of its own."""
    head_A = host.tensor(group.heads).repeat_interleave(group.entry_NP.shape[1])
    entry_NP = group.entry_NP.flatten()[:, None]
    if chosen_A is not None:
        head_A, entry_NP = head_A[chosen_A], entry_NP[chosen_A]
    return Whole(group.sequence, tuple(head_A.tolist()), group.span, entry_NP)
