"""Pages leave the device: those with a copy below at once, others as records of whole spans."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.base import REF
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
    row_A, place_A = used_pages(rows.paging.table).nonzero().unbind(1)
    page_A = rows.paging.table.pages_RW[row_A, place_A].long()
    id_A = rows.paging.pages(REF)[page_A]
    may_A = (own.at_P[id_A] != NOWHERE) & (every | (own.step_P[id_A] < rows.last))
    copied_A = torch.unique(id_A[may_A & (own.record_P[id_A] != NOWHERE)])
    if len(copied_A):
        order_A = own.step_P[copied_A].argsort(stable=True)
        going_A = copied_A[order_A[: -(-least // page_bytes)]]
        rows.shelf.leave(going_A)
        least -= len(going_A) * page_bytes
    if least <= 0:
        return True
    may_A &= own.record_P[id_A] == NOWHERE
    if not bool(may_A.any()):
        return False
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
