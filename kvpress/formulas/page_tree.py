"""The tree over the pages of a row: where its nodes lie, and their boxes.

Node i of level l covers the places from i·2ˡ up to (i + 1)·2ˡ of a page table; level 0 are the
pages themselves. The nodes of the levels above lie one level after the other, the lowest first: X
of a row. The highest level is the first one of a single node, or that of 64 pages: its nodes are
roots.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_LEVEL = 6  # a root covers 64 pages at most
MERGE_STEPS = 8  # after so many in a row without use the children of a node are given up
MOST_PLACES = 2**28 - 1  # of a row: what is left of 64 bits that order nodes


def level_sizes(places: int) -> list[int]:
    """How many nodes every level has, pages first."""
    sizes = [places]
    while sizes[-1] > 1 and len(sizes) <= MOST_LEVEL:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def inner_nodes(places: int) -> int:
    """X: the nodes of a row that are no pages."""
    return sum(level_sizes(places)[1:])


def tree_of(box_P2D: Tensor, table_RW: Tensor, pages_R: Tensor) -> Tensor:
    """The boxes of inner nodes, each the union of those of its pages: `[R, X, 2, D]`.

    Least and largest numbers are not rounded, so that a node's bound is never below its pages'.
    Zero where a node covers no page of its row. On any device, without waiting for it.
    """
    (rows, places), width = table_RW.shape, box_P2D.shape[2]
    if not len(box_P2D) or places < 2:
        return box_P2D.new_zeros(rows, inner_nodes(places), 2, width)
    place_W = torch.arange(places, device=table_RW.device)
    held_RW = place_W < pages_R[:, None]
    box_RW2D = box_P2D[table_RW.long().where(held_RW, 0)]
    # Low ends, and high ones turned: the union of both is the least.
    end_RW2D = torch.stack([box_RW2D[:, :, 0], -box_RW2D[:, :, 1]], 2)
    end_RW2D = end_RW2D.masked_fill(~held_RW[:, :, None, None], torch.inf)
    levels = []
    for _ in level_sizes(places)[1:]:
        odd = end_RW2D.shape[1] % 2
        end_RW2D = torch.nn.functional.pad(end_RW2D, (0, 0, 0, 0, 0, odd), value=torch.inf)
        end_RW2D = torch.unflatten(end_RW2D, 1, (-1, 2)).amin(2)
        levels.append(end_RW2D)
    end_RX2D = torch.cat(levels, 1)
    end_RX2D = end_RX2D.masked_fill(~covered(places, pages_R)[:, :, None, None], 0)
    return torch.stack([end_RX2D[:, :, 0], -end_RX2D[:, :, 1]], 2)


def covered(places: int, pages_R: Tensor) -> Tensor:
    """True for the inner nodes that cover a page of their row: they count. bool `[R, X]`."""
    first = [
        torch.arange(size, device=pages_R.device) << level
        for level, size in enumerate(level_sizes(places))
    ]
    return torch.cat(first)[places:] < pages_R[:, None]
