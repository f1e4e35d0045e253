"""Spans: pages of a row in a row that go to a lower tier together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.table import PageTable

SPAN = 128  # slots that go down together: at least so many


def span_pages(layout: PageLayout) -> int:
    """Pages of a span."""
    return max(1, SPAN // layout.slots)


class Whole(NamedTuple):
    """A span of some heads of one sequence that is complete: entries of a list of pages."""

    sequence: int
    heads: tuple[int, ...]
    span: int
    entry_NP: Tensor


def whole_spans(
    table: PageTable, span: int, row_A: Tensor, place_A: Tensor, usable_A: Tensor
) -> Iterator[Whole]:
    """The spans of so many pages of which all are in a list, by span and sequence.

    Those of a sequence are of as many heads as have them.
    """
    rows, heads = len(table.counts), table.heads
    key_A = (place_A // span * rows + row_A).where(usable_A, -1)
    order_A = (key_A * span + place_A % span).argsort(stable=True)
    keys, counts = torch.unique_consecutive(key_A[order_A], return_counts=True)
    first = counts.cumsum(0) - counts
    complete = (counts == span) & (keys >= 0)
    entry_NP = order_A[first[complete][:, None] + host.arange(span)]
    row_N, span_N = keys[complete] % rows, keys[complete] // rows
    group_N = span_N * table.sequences + row_N // heads
    start = 0
    for size in torch.unique_consecutive(group_N, return_counts=True)[1].tolist():
        mine = slice(start, start + size)
        own = tuple((row_N[mine] % heads).tolist())
        yield Whole(int(row_N[start]) // heads, own, int(span_N[start]), entry_NP[mine])
        start += size


def single(group: Whole, chosen_A: Tensor | None = None) -> Whole:
    """The pages of a span, or some of them, each as a slice of its own."""
    head_A = host.tensor(group.heads).repeat_interleave(group.entry_NP.shape[1])
    entry_NP = group.entry_NP.flatten()[:, None]
    if chosen_A is not None:
        head_A, entry_NP = head_A[chosen_A], entry_NP[chosen_A]
    return Whole(group.sequence, tuple(head_A.tolist()), group.span, entry_NP)
