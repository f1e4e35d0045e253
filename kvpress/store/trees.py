"""Trees of boxes over the pages of rows, and how far each of them is opened.

What is here follows from the boxes, and changes what a step costs, never what it finds: it is in no
file, and a copy of rows begins with none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_tree import level_sizes, tree_of
from kvpress.host import lasting
from kvpress.ops import backends
from kvpress.store.base import BOX
from kvpress.store.chosen import Bounds, Chosen, Wanted, rows_of
from kvpress.store.packed import PackedRows

_LEAST = 256  # pages of a row below which a scan is faster, whatever the keys
_MUCH = 0.5  # of the boxes of a scan, as many as which a search takes as long
_WARM, _SCANS = 4, 64  # steps of such searches, and of scans after them


class Tree(NamedTuple):
    """The inner nodes of all rows of a part. table, counts: of the rows that it was made of."""

    table: Tensor
    counts: Tensor
    box_RX2D: Tensor
    state_RX: Tensor  # int8
    steps: list[bool]  # whether the last ones opened much of it


class Trees:
    """The trees of some rows, by the numbers of their parts."""

    def __init__(self) -> None:
        self._by_number: dict[int, Tree] = {}
        self._scans = 0  # steps before a tree is searched again

    def allowed(self, wanted: Wanted, parts: Sequence[PackedRows]) -> Wanted:
        """The same, without a tree where a scan of all boxes is faster, which finds the same."""
        return wanted if not wanted.tree or self._worthwhile(parts) else wanted.scanned()

    def _worthwhile(self, parts: Sequence[PackedRows]) -> bool:
        """Whether trees are searched in this step.

        Not where a scan of all boxes is one small kernel, of few pages, and for some steps after
        keys were so unlike each other that most of a tree was opened.
        """
        self._scans -= 1
        if self._scans >= 0 or not parts or parts[0].paging.table.device.type != "cpu":
            return False
        most = max(part.paging.table.pages_RW.shape[1] for part in parts)
        return most >= _LEAST and backends()["cpu"] == "cpu"

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept alive for them alone."""
        for tree in self._by_number.values():
            yield from (tree.box_RX2D, tree.state_RX)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def search(
        self, number: int, part: PackedRows, wanted: Wanted, keep_r: Tensor
    ) -> tuple[Bounds, Chosen]:
        """What `choose` finds among all pages of some rows, and the bounds that were looked at."""
        sequences = wanted.sequences
        tree, row_r = self._tree(number, part), part.paging.table.row_index(sequences)
        state_rX = tree.state_RX if sequences is None else tree.state_RX[row_r]
        box_rX2D = tree.box_RX2D if sequences is None else tree.box_RX2D[row_r]
        rows = rows_of(part, sequences)
        place_rW, chosen_r, bound_bNW, boxes_r = ops.search_pages(
            wanted.query_bND,
            part.paging.pages(BOX),
            rows,
            box_rX2D,
            state_rX,
            wanted.always(part),
            keep_r,
        )
        if sequences is not None:
            tree.state_RX[row_r] = state_rX
        boxes = int(boxes_r.sum())
        # What is opened for the first time costs more than it does from then on.
        tree.steps.append(boxes > _MUCH * int(rows.pages_R.sum()))
        if len(tree.steps) > _WARM and all(tree.steps[-_WARM:]):
            self._scans = _SCANS
            tree.steps.clear()
        bounds = Bounds(part, number, *rows, bound_bNW, bound_bNW, boxes)
        return bounds, Chosen(part, number, place_rW, chosen_r)

    def _tree(self, number: int, part: PackedRows) -> Tree:
        """The tree of a part, made anew where rows have other pages than it was made of."""
        known, table = self._by_number.get(number), part.paging.table
        if known is None or known.table is not table.pages_RW or known.counts is not part.counts:
            known = self._by_number[number] = _made(part, known)
        return known


@lasting
def _made(part: PackedRows, before: Tree | None) -> Tree:
    """The tree of all rows, opened as far as the one before was."""
    table = part.paging.table
    rows = rows_of(part, None)
    box_RX2D = tree_of(part.paging.pages(BOX), *rows)
    state_RX = torch.full(box_RX2D.shape[:2], -1, dtype=torch.int8, device=box_RX2D.device)
    if before is not None and len(before.state_RX) == len(state_RX):
        old, new = (level_sizes(x.shape[1]) for x in (before.table, rows.table_RW))
        at_old = at_new = 0
        for size_old, size_new in zip(old[1:], new[1:], strict=False):
            both = min(size_old, size_new)
            state_RX[:, at_new : at_new + both] = before.state_RX[:, at_old : at_old + both]
            at_old, at_new = at_old + size_old, at_new + size_new
    return Tree(table.pages_RW, part.counts, box_RX2D, state_RX, before.steps if before else [])
