"""The search in the tree of pages: P4, its frontier, what it costs, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.csrc.search_pages import Operands
from torch import Tensor
from trees import SIZES, Sizes, boxes_of_keys, but, line, make, query_of, rows_of

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.page_tree import MERGE_STEPS, covered, level_sizes, tree_of
from kvpress.ops.operands import named

reference = ops.implementation("search_pages", "reference")
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])


class Found(NamedTuple):
    place_RW: Tensor
    chosen_R: Tensor
    bound_BNW: Tensor
    boxes_R: Tensor


def search(backend: str, operands: Operands) -> Found:
    return Found(*(ops.search_pages if backend == "operator" else reference)(*operands))


def scanned(backend: str, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The bounds of all pages, and which of them a scan chooses."""
    score, choose = ops.score_pages, ops.choose_pages
    if backend == "reference":
        score, choose = (ops.implementation(f"{x}_pages", "reference") for x in ("score", "choose"))
    bound_BNW = score(*operands[:3])
    return bound_BNW, *choose(bound_BNW, operands.rows, operands.always, operands.keep_R)


def check_states(operands: Operands) -> None:
    """No node that is expanded lies below a collapsed one, or covers no page."""
    places, state_RX = operands.rows.table_RW.shape[1], operands.state_RX
    assert ((state_RX >= -1) & (state_RX < MERGE_STEPS)).all()
    assert (state_RX[~covered(places, operands.rows.pages_R)] == -1).all()
    levels = state_RX.split(level_sizes(places)[1:], 1)
    for below, above in itertools.pairwise(levels):
        closed = (above < 0).repeat_interleave(2, 1)[:, : below.shape[1]]
        assert (below[closed] == -1).all()


@BACKENDS
@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, wild=st.booleans())
def test_the_set_is_that_of_a_scan_for_every_frontier(
    sizes: Sizes, wild: bool, backend: str
) -> None:
    generator = torch.Generator().manual_seed(sizes.seed)
    operands = make(sizes, generator)
    for step in range(12):
        if step == 0 or wild:  # any splits and merges
            state_RX = operands.state_RX
            any_RX = torch.randint(-3, 12, state_RX.shape, generator=generator).to(torch.int8)
            state_RX.copy_(any_RX)
        if step % 3 == 0:
            operands = operands._replace(query_BND=query_of(sizes, generator))
        own_BNW, place_RW, chosen_R = scanned(backend, operands)
        found = search(backend, operands)
        assert torch.equal(found.place_RW, place_RW) and torch.equal(found.chosen_R, chosen_R)
        assert (found.boxes_R <= 2 * operands.rows.pages_R).all()
        assert (found.boxes_R >= (operands.rows.pages_R > 0)).all()
        assert (found.bound_BNW >= own_BNW).all()
        assert torch.equal(found.bound_BNW.isinf(), own_BNW.isinf())
        check_states(operands)


@BACKENDS
@settings(deadline=None, max_examples=60)
@given(sizes=SIZES)
def test_no_node_scores_below_its_children(sizes: Sizes, backend: str) -> None:
    operands = make(sizes, torch.Generator().manual_seed(sizes.seed))
    operands = operands._replace(keep_R=operands.rows.pages_R)  # nothing is searched
    nodes = level_sizes(sizes.places)[1:]
    above = None
    for level in range(len(nodes), -1, -1):
        open_X = torch.cat([torch.full((n,), -int(i < level)) for i, n in enumerate([0, *nodes])])
        state_RX = open_X.to(torch.int8).expand_as(operands.state_RX).contiguous()
        found = search(backend, operands._replace(state_RX=state_RX))
        assert above is None or (above >= found.bound_BNW).all()
        above = found.bound_BNW


@BACKENDS
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES)
def test_bounds_of_pages_are_those_of_a_scan_where_all_nodes_are_open(
    sizes: Sizes, backend: str
) -> None:
    operands = make(sizes, torch.Generator().manual_seed(sizes.seed))
    operands.state_RX.zero_()
    assert torch.equal(search(backend, operands).bound_BNW, scanned(backend, operands)[0])


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES)
def test_the_operator_is_its_reference(sizes: Sizes) -> None:
    """Boxes and states too, where scores are exact."""
    sizes = sizes._replace(ties=True)
    generator = torch.Generator().manual_seed(sizes.seed)
    operands = make(sizes, generator)
    other = operands._replace(state_RX=operands.state_RX.clone())
    for _ in range(10):
        for one, two in zip(search("operator", operands), search("reference", other), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(operands.state_RX, other.state_RX)
        query_BND = query_of(sizes, generator)
        operands, other = (x._replace(query_BND=query_BND) for x in (operands, other))


@BACKENDS
def test_the_frontier_follows_what_is_read_and_forgets_what_is_not(backend: str) -> None:
    # Nodes of two pages: 0 to 3; of four: 4 and 5; the root: 6.
    operands = line(9, 2, 3, 4, -5, -6, -7, -8)
    state_X = operands.state_RX[0]
    found = search(backend, operands)
    assert found.place_RW[0, 0] == 0 and found.boxes_R == 7
    assert state_X.tolist() == [0, -1, -1, -1, 0, -1, 0]
    assert found.bound_BNW.flatten().tolist() == [9, 2, 4, 4, -5, -5, -5, -5]
    assert search(backend, operands).boxes_R == 4  # the frontier alone
    operands.query_BND.neg_()  # the last page is the best one now
    for step in range(MERGE_STEPS):
        assert search(backend, operands).place_RW[0, 0] == 7
        age = step + 1 if step + 1 < MERGE_STEPS else -1
        assert state_X.tolist() == [age, -1, -1, 0, 0, 0, 0]
    for step in range(MERGE_STEPS):
        search(backend, operands)
        age = step + 1 if step + 1 < MERGE_STEPS else -1
        assert state_X.tolist() == [-1, -1, -1, 0, age, 0, 0]
    assert search(backend, operands).boxes_R == 4


@BACKENDS
def test_pages_that_are_read_anyway_count_and_are_not_searched(backend: str) -> None:
    operands = line(1, 2, 3, 4, 5, 6, 7, 8)
    operands.always.span_P2.copy_(torch.arange(8).int()[:, None])
    operands = but(operands, sink_R=torch.tensor([1]), from_R=torch.tensor([6]))
    found = search(backend, operands._replace(keep_R=torch.tensor([2])))
    assert found.place_RW.tolist() == [[0, 6, 7, -1, -1, -1, -1, -1]] and found.chosen_R == 3
    assert found.boxes_R == 1 and (found.bound_BNW == 8).all()
    found = search(backend, operands._replace(keep_R=torch.tensor([4])))
    assert found.place_RW.tolist() == [[0, 5, 6, 7, -1, -1, -1, -1]]
    found = search(backend, operands._replace(keep_R=torch.tensor([99])))
    assert found.place_RW.tolist() == [[*range(8)]] and found.chosen_R == 8


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 33, 63, 64])
@BACKENDS
def test_boxes_of_a_row_that_fills_its_table_in_part(pages: int, backend: str) -> None:
    """A node with one child has its child's box, so that a lonely page is one box, not seven."""
    operands = but(line(*torch.randn(64).tolist()), pages_R=torch.tensor([pages]))
    tree_RX2D = tree_of(operands.box_P2D, operands.rows.table_RW, operands.rows.pages_R)
    state_RX = torch.full_like(operands.state_RX, -1)
    operands = operands._replace(tree_RX2D=tree_RX2D, state_RX=state_RX)
    found = search(backend, operands)
    assert found.boxes_R <= max(0, 2 * pages - 1) and found.chosen_R == min(1, pages)
    assert found.bound_BNW[..., pages:].eq(-torch.inf).all()


def test_the_result_depends_neither_on_threads_nor_on_the_batch() -> None:
    sizes = Sizes(3, 2, 4, 96, 300, torch.bfloat16, False, 1)
    operands = make(sizes, torch.Generator().manual_seed(1))
    state_RX = operands.state_RX.clone()
    torch.set_num_threads(1)
    whole = search("operator", operands)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        again = operands._replace(state_RX=state_RX.clone())
        for one, two in zip(search("operator", again), whole, strict=True):
            assert torch.equal(one, two)
        assert torch.equal(again.state_RX, operands.state_RX)
    for row in range(6):
        part = slice(row, row + 1)
        query_BND = operands.query_BND.view(6, 4, 96)[part]
        own: dict[str, Any] = {n: x[part] for n, x in named(operands).items() if "_R" in n}
        own |= {"query_BND": query_BND, "state_RX": state_RX[part].clone()}
        alone = search("operator", but(operands, **own))
        assert torch.equal(alone.bound_BNW[0], whole.bound_BNW.view(6, 4, 300)[row])
        for name in ("place_RW", "chosen_R", "boxes_R"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[part])


def boxes_of_steps(centre_RWD: Tensor, peak: float, keep: int) -> list[float]:
    """Boxes per page of every step. Queries look for a page each, and for another one now and then.

    peak: how far a query points to the centre of its page; 0: anywhere.
    """
    rows, places, width = centre_RWD.shape
    box_RW2D = boxes_of_keys(centre_RWD, 0.1).bfloat16()
    operands = rows_of(torch.zeros(rows, 4, width).bfloat16(), box_RW2D, keep)
    made = []
    for step in range(32):
        if step % 16 == 0:
            sought_RG = torch.randint(0, places, (rows, 4))
        query_RGD = peak * centre_RWD[torch.arange(rows)[:, None], sought_RG]
        query_RGD = query_RGD + torch.randn(rows, 4, width)
        operands.query_BND.copy_(query_RGD.view(operands.query_BND.shape))
        found = search("operator", operands)
        assert torch.equal(found.place_RW, scanned("operator", operands)[1])
        made.append(float(found.boxes_R.float().mean()) / places)
    return made


def test_structure_saves_boxes_and_its_lack_costs_them() -> None:
    """Peaked queries in 64-token topics, or in longer ones; then keys without any structure."""
    alone_RWD = torch.randn(2, 256, 128)
    boxes = boxes_of_steps(alone_RWD, 3.0, 3 + 4)  # as many as there are topics that are sought
    assert sum(boxes[8:]) / 24 < 0.7
    long_RWD = torch.randn(2, 16, 128).repeat_interleave(16, 1) + 0.2 * alone_RWD
    boxes = boxes_of_steps(long_RWD, 1.0, 16)
    assert sum(boxes[8:]) / 24 < 0.7
    boxes = boxes_of_steps(alone_RWD, 0.0, 32)
    assert 1.9 < boxes[0] <= 2 and all(1 <= x < 1.1 for x in boxes[MERGE_STEPS:])


@BACKENDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_BND": torch.zeros(1, 1, 2)}, "D is"),
        ({"query_BND": torch.zeros(1, 1, 1).double()}, "query_BND"),
        ({"box_P2D": torch.zeros(8, 2, 1).half()}, "dtype as box_P2D|torch.float16"),
        ({"table_RW": torch.full((1, 8), 8).int()}, "table_RW names"),
        ({"pages_R": torch.tensor([9])}, "9.* (pages|entries)"),
        ({"tree_RX2D": torch.zeros(1, 6, 2, 1), "state_RX": torch.zeros(1, 6).char()}, "has 7"),
        ({"tree_RX2D": torch.zeros(1, 7, 3, 1)}, "X is"),
        ({"state_RX": torch.zeros(1, 7).short()}, "int8"),
        ({"state_RX": torch.zeros(1, 1).char().expand(1, 7)}, "share memory|contiguous"),
        ({"span_P2": torch.zeros(7, 2).int()}, "P is"),
        ({"keep_R": torch.zeros(1).int()}, "int64"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Tensor], message: str, backend: str) -> None:
    with pytest.raises(OperatorError, match=message):
        search(backend, but(line(*range(8)), **change))


def test_search_pages_passes_opcheck() -> None:
    operands = tuple(named(line(4, 3, 2, 1, 0)).values())
    torch.library.opcheck(torch.ops.kvpress.search_pages.default, operands)
