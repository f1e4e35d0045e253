"""Pages of all layers on their way to the device before the first layer is computed.

They come in the order of the layers, a few layers at a time: each waits for its own pages alone.
What is on its way early changes when it is there, never what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.tiered import TieredPages
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.shelf import Shelf

# Rows, and the numbers of the pages that their next step will most likely choose: int64, host.
Likely: TypeAlias = tuple[TieredPages, Tensor]
_GROUPS = 6  # of layers, whose pages come together


def bring_ahead(likely: Sequence[Likely]) -> None:
    """Begins to bring what is not on the device, as far as other pages may go for it."""
    for shelf in dict.fromkeys(rows.shelf for rows, _ in likely):
        with shelf.tiers.lock:
            _bring(shelf, [own for own in likely if own[0].shelf is shelf])


def _bring(shelf: Shelf, likely: Sequence[Likely]) -> None:
    for rows, _ in likely:
        rows.steps.settle()  # a pass may have failed, or have had no use for what it foresaw
    id_A = torch.cat([id_A for _, id_A in likely])
    before_A = torch.cat([rows.steps.chosen for rows, _ in likely])
    last = [torch.full_like(rows.steps.chosen, rows.steps.last) for rows, _ in likely]
    step = shelf.tiers.tick()
    bare = shelf.idle.choose(before_A, torch.cat(last), id_A, step)
    for rows, chosen_A in likely:
        rows.steps.expect(chosen_A, step, bare)
    ends = host.tensor([len(id_A) for _, id_A in likely]).cumsum(0)
    away_A = _first_of_each(id_A, (shelf.directory.at_P[id_A] == NOWHERE).nonzero().flatten())
    first, _ = likely[0]
    room = shelf.tiers.make_space(len(away_A) * shelf.page_bytes, shelf.arena, first)
    away_A = away_A[: room // shelf.page_bytes]
    at_A = shelf.arena.take(len(away_A), shelf.page_bytes)
    away_A = away_A[: len(at_A)]  # what is free may lie where no page of this size can begin
    done = torch.searchsorted(away_A, ends).tolist()  # pages up to the end of every layer
    least, begin, waiting = -(-len(away_A) // _GROUPS), 0, list[Likely]()
    for (rows, _), first_of, end in zip(likely, [0, *done], done, strict=False):
        waiting.append((rows, id_A[away_A[first_of:end]]))
        if end - begin >= max(1, least) or end == len(away_A):
            coming = shelf.early.begin(id_A[away_A[begin:end]], at_A[begin:end])
            for own, mine_A in waiting:
                own.steps.wait_for(coming, mine_A)
            begin, waiting = end, []


def _first_of_each(id_A: Tensor, away_A: Tensor) -> Tensor:
    """Of some entries of a list those whose page stands in no earlier one: beams share pages."""
    page_A, which_A = torch.unique(id_A[away_A], return_inverse=True)
    if len(page_A) == len(away_A):
        return away_A
    least_A = torch.full_like(page_A, len(id_A)).scatter_reduce_(0, which_A, away_A, "amin")
    return least_A.sort().values
