"""Python reference of `search_pages`: the search by `heapq`, on scores of `score_pages`."""

from __future__ import annotations

import heapq
import math

import torch
from kvpress.csrc.score_pages import Operands as ScoreOperands
from kvpress.csrc.score_pages import reference as scores
from kvpress.csrc.search_pages import WRITES, Operands
from torch import Tensor

from kvpress.formulas.page_tree import MERGE_STEPS, MOST_PLACES, inner_nodes, level_sizes
from kvpress.ops import shapes
from kvpress.ops.operands import RowPages, named

Node = tuple[int, int]  # level and index
_NOW = MERGE_STEPS  # the state of a node that is expanded in this step, until it ends


def search_pages(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`place_RW` and `chosen_R` of `choose_pages` on `score_pages`; bounds; boxes evaluated.

    bound_BNW: fp32, no key of a page gives a query a larger product: the bound of the smallest node
    with that page that was evaluated; −∞ beyond the pages of a row. boxes_R: int64. Changes
    `state_RX`. Raises OperatorError.
    """
    query_BND, box_P2D, (table_RW, pages_R), tree_RX2D, state_RX = operands[:5]
    check(operands)
    rows, places = table_RW.shape
    inner = state_RX.shape[1]
    leaf_BNW = scores.score_pages(ScoreOperands(query_BND, box_P2D, operands.rows))
    node_RX = torch.arange(rows * inner, device=table_RW.device).view(rows, inner).int()
    nodes = RowPages(node_RX, torch.full_like(pages_R, inner))
    inner_BNX = scores.score_pages(ScoreOperands(query_BND, tree_RX2D.flatten(0, 1), nodes))
    group = leaf_BNW.shape[0] * leaf_BNW.shape[1] // rows
    score_RGX = torch.cat([leaf_BNW, inner_BNX], 2).view(rows, group, places + inner)
    place_RW = torch.full_like(table_RW, -1)
    chosen_R, boxes_R = torch.zeros_like(pages_R), torch.zeros_like(pages_R)
    bound_RGW = torch.full_like(score_RGX[:, :, :places], -torch.inf)
    for row, pages in enumerate(pages_R.tolist()):
        search = _Search(score_RGX[row], state_RX[row].tolist(), places, pages)
        search.choose(_always(operands, row), int(operands.keep_R[row]))
        state_RX[row] = state_RX.new_tensor(search.settle(bound_RGW[row]))
        chosen = sorted(search.chosen)
        place_RW[row, : len(chosen)] = table_RW.new_tensor(chosen)
        chosen_R[row], boxes_R[row] = len(chosen), len(search.evaluated)
    return place_RW, chosen_R, bound_RGW.view(leaf_BNW.shape), boxes_R


def _always(operands: Operands, row: int) -> set[int]:
    """The places of a row that are read anyway."""
    (table_RW, pages_R), (span_P2, sink_R, from_R) = operands.rows, operands.always
    page_A = table_RW[row, : int(pages_R[row])].long()
    span_A2 = span_P2[page_A].long()
    first, last = sink_R[row], from_R[row]
    always_A: Tensor = (span_A2[:, 0] < first) | (span_A2[:, 1] >= last)
    return set(always_A.nonzero().flatten().tolist())


class _Search:
    """One step in the tree of one row. `nodes` are those that were reached from the roots."""

    def __init__(self, score_GX: Tensor, state: list[int], places: int, pages: int) -> None:
        self.score_GX, self.state = score_GX, state
        self.scores: list[list[float]] = score_GX.tolist()
        sizes = level_sizes(places)
        self.begin = [sum(sizes[:level]) for level in range(len(sizes))]
        self.pages, self.places = pages, places
        self.chosen: set[int] = set()
        self.evaluated: set[int] = set()
        self.nodes: list[Node] = []
        for root in range(self._counted(len(sizes) - 1)):
            self._open((len(sizes) - 1, root))

    def choose(self, always: set[int], keep: int) -> None:
        """Which pages are read."""
        self.chosen = set(always)
        wanted = min(max(len(always), keep), self.pages)
        if wanted == self.pages:
            self.chosen = set(range(self.pages))
        if wanted == len(self.chosen):
            return
        best_G1 = self.score_GX.new_tensor([self._best(query) for query in self.scores])[:, None]
        rank_GX = (self.score_GX - best_G1).masked_fill(self.score_GX == best_G1, 0)
        rank = rank_GX.amax(0).tolist()  # as `choose_pages` ranks

        def key(node: Node) -> tuple[float, bool, int, int]:
            return -rank[self._evaluate(node)], not node[0], node[1] << node[0], node[0]

        heap = [key(node) for node in self._open_nodes(always)]
        heapq.heapify(heap)
        while len(self.chosen) < wanted:
            _, is_page, place, level = heapq.heappop(heap)
            if is_page:
                self.chosen.add(place)
                continue
            for node in self._expand((level, place >> level)):
                if node[0] or node[1] not in always:
                    heapq.heappush(heap, key(node))

    def settle(self, bound_GW: Tensor) -> list[int]:
        """The states after the step. Writes the bounds of the pages."""
        states = [-1] * len(self.state)
        top = len(self.begin) - 1
        for root in range(self._counted(top)):
            self._settle((top, root), states, bound_GW)
        return states

    def _settle(self, node: Node, states: list[int], bound_GW: Tensor) -> None:
        (level, index), age = node, self._age(node)
        if age < 0:
            part = slice(index << level, min(self.pages, (index + 1) << level))
            bound_GW[:, part] = self.score_GX[:, self._evaluate(node), None]
            return
        children = self._children(node)
        used = [self._age(c) >= 0 if c[0] else c[1] in self.chosen for c in children]
        age = 0 if age == _NOW or any(used) else age + 1
        states[self.begin[level] + index - self.places] = age if age < MERGE_STEPS else -1
        for child in children:
            self._settle(child, states, bound_GW)

    def _best(self, query: list[float]) -> float:
        """The largest bound of a query over all pages: b."""
        leaves = [query[node[1]] for node in self.nodes if not node[0]]
        best = max(leaves, default=-math.inf)
        nodes = [node for node in self._open_nodes(set()) if node[0]]
        heap = [(-query[self._evaluate(node)], node[1] << node[0], node[0]) for node in nodes]
        heapq.heapify(heap)
        while heap:
            bound, place, level = heapq.heappop(heap)
            if not -bound > best:
                break
            for node in self._expand((level, place >> level)):
                bound = query[self._evaluate(node)]
                if node[0]:
                    heapq.heappush(heap, (-bound, node[1] << node[0], node[0]))
                else:
                    best = max(best, bound)
        return best

    def _open_nodes(self, without: set[int]) -> list[Node]:
        """The frontier as it is now, but for some pages."""
        return [
            (level, index)
            for level, index in self.nodes
            if (self._age((level, index)) < 0 if level else index not in without)
        ]

    def _open(self, node: Node) -> None:
        """The frontier at the beginning of the step, at and below a node."""
        age = self._age(node)
        if age < 0:
            self._reach(node)
            return
        self._set(node, min(age, MERGE_STEPS - 1))
        for child in self._children(node):
            self._open(child)

    def _expand(self, node: Node) -> list[Node]:
        children = self._children(node)
        self._set(node, _NOW)
        for child in children:
            if child[0]:
                self._set(child, -1)
            self._reach(child)
        return children

    def _reach(self, node: Node) -> None:
        self.evaluated.add(self._evaluate(node))
        self.nodes.append(node)

    def _evaluate(self, node: Node) -> int:
        """The number of a node's box: a node with one child has that of its child."""
        level, index = node
        while level and (2 * index + 1) << (level - 1) >= self.pages:
            level, index = level - 1, 2 * index
        return self.begin[level] + index

    def _children(self, node: Node) -> list[Node]:
        level, index = node[0] - 1, 2 * node[1]
        return [(level, i) for i in (index, index + 1) if i < self._counted(level)]

    def _counted(self, level: int) -> int:
        """How many nodes of a level cover pages of the row."""
        return -(-self.pages >> level)

    def _age(self, node: Node) -> int:
        """The state of a node; that of a page is −1."""
        level, index = node
        return self.state[self.begin[level] + index - self.places] if level else -1

    def _set(self, node: Node, age: int) -> None:
        self.state[self.begin[node[0]] + node[1] - self.places] = age


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op, (query_BND, box_P2D, rows, tree_RX2D, state_RX, always, keep_R) = "search_pages", operands
    (table_RW, pages_R), (span_P2, sink_R, from_R) = rows, always
    wide = {"pages_R": pages_R, "sink_R": sink_R, "from_R": from_R, "keep_R": keep_R}
    ends = {"box_PXD": box_P2D, "span_PX": span_P2, "tree_RKXD": tree_RX2D, "state_RK": state_RX}
    lengths = shapes.bind(op, {"query_BND": query_BND, "table_RW": table_RW, **wide, **ends})
    shapes.floating(op, {"query_BND": query_BND, "box_P2D": box_P2D})
    shapes.of_dtype(op, query_BND.dtype, {"query_BND": query_BND})
    shapes.of_dtype(op, box_P2D.dtype, {"box_P2D": box_P2D, "tree_RX2D": tree_RX2D})
    shapes.of_dtype(op, torch.int32, {"table_RW": table_RW, "span_P2": span_P2})
    shapes.of_dtype(op, torch.int8, {"state_RX": state_RX})
    shapes.of_dtype(op, torch.int64, wide)
    if lengths["X"] != 2:
        shapes.refuse(op, f"boxes and spans have {lengths['X']} ends; they have 2")
    shapes.at_least_one(op, lengths, "BNRD")
    shapes.at_most(op, lengths, "D", shapes.MOST_CODED)
    shapes.at_most(op, lengths, "W", MOST_PLACES)
    if lengths["R"] % lengths["B"] or lengths["N"] % (lengths["R"] // lengths["B"]):
        shapes.refuse(
            op,
            f"{lengths['N']} query heads of {lengths['B']} sequences do not share {lengths['R']}"
            " rows",
        )
    if lengths["K"] != inner_nodes(lengths["W"]):
        why = f"a row of {lengths['W']} places has {inner_nodes(lengths['W'])}"
        shapes.refuse(op, f"state_RX has {lengths['K']} nodes; {why}")
    shapes.apart(op, named(operands), WRITES)
    scores.check_table(op, *rows, lengths["P"])
