"""Bounds by the cells of keys: tighter than those of boxes, and broken by no key."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from boxes import BACKENDS, BF16, DTYPES, FP32, INF, NAN, all_of, bounds_of, keys_of, run_of
from kvpress.csrc.missed_mass.reference import slack
from kvpress.csrc.page_bounds.reference import cells
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_cells import to_cells
from kvpress.ops import Places, RowPages

GROUPS = [(1, 1), (7, 3), (16, 8), (80, 5), (128, 4), (256, 1)]  # channels, query heads
BITS = pytest.mark.parametrize("bits", [2, 4])
SIZES = pytest.mark.parametrize(("width", "heads"), GROUPS, ids=str)


class Scored(NamedTuple):
    """Pages of keys, queries, and the bounds by boxes."""

    key_PSD: Tensor
    query_BND: Tensor
    box_P2D: Tensor
    length_P2: Tensor
    bound_BNW: Tensor
    bits: int

    def by_cells(self, backend: str, place_RW: Tensor, chosen_R: Tensor) -> tuple[Tensor, Tensor]:
        cell_PY = to_cells(cells(self.key_PSD.float(), self.box_P2D, self.bits), self.bits)
        pages = (self.query_BND, self.box_P2D, cell_PY, all_of(self.box_P2D))
        named = (Places(place_RW, chosen_R), self.bound_BNW, self.bits, self.key_PSD.shape[1])
        rank_BNW, bound_BNW = run_of(backend, "score_cells")(*pages, *named)
        return rank_BNW, bound_BNW

    @property
    def exact_NPS(self) -> Tensor:
        return torch.einsum("nd,psd->nps", self.query_BND[0].double(), self.key_PSD.double())


def scored(kind: str, dtype: torch.dtype, bits: int, width: int, heads: int) -> Scored:
    key_PSD = keys_of(kind, dtype, 11, 32, width)
    query_BND = keys_of("mixed" if kind == "mixed" else "normal", dtype, 1, heads, width)
    box_P2D, length_P2 = bounds_of(key_PSD)
    bound_BNW = ops.score_pages(query_BND, box_P2D, all_of(box_P2D))
    return Scored(key_PSD, query_BND, box_P2D, length_P2, bound_BNW, bits)


@BACKENDS
@DTYPES
@BITS
@SIZES
@pytest.mark.parametrize("kind", ["normal", "alike", "equal", "denormal", "zeros", "mixed"])
def test_no_key_gives_a_larger_product(
    kind: str, width: int, heads: int, bits: int, dtype: torch.dtype, backend: str
) -> None:
    x = scored(kind, dtype, bits, width, heads)
    rank_BNW, bound_BNW = x.by_cells(backend, *all_of(x.box_P2D))
    error, _ = slack(width, 11, 1)
    slack_NP = x.query_BND[0].double().norm(dim=1)[:, None] * error * x.length_P2[:, 0].double()
    slack_NP += width * 2.0**-149
    assert bool((bound_BNW[0].double() + slack_NP >= x.exact_NPS.amax(2)).all())
    assert bool((bound_BNW <= x.bound_BNW).all()) and bool((rank_BNW <= bound_BNW).all())


@BACKENDS
@DTYPES
@BITS
@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-100, 2.0**60], ids=str)
def test_bounds_hold_for_queries_of_any_size(
    scale: float, bits: int, dtype: torch.dtype, backend: str
) -> None:
    x = scored("normal", dtype, bits, 64, 3)
    x.key_PSD[..., 0] *= 300
    query_BND = x.query_BND.float() * scale
    box_P2D, _ = bounds_of(x.key_PSD)
    loose = ops.score_pages(query_BND, box_P2D, all_of(box_P2D))
    x = x._replace(query_BND=query_BND, box_P2D=box_P2D, bound_BNW=loose)
    _, bound_BNW = x.by_cells(backend, *all_of(box_P2D))
    slack_NP = x.query_BND[0].double().norm(dim=1)[:, None] * 1e-5 * x.key_PSD.double().norm()
    assert bool((bound_BNW[0].double() + slack_NP * (scale > 1) >= x.exact_NPS.amax(2)).all())


@BACKENDS
@BITS
def test_a_bound_is_wrong_by_less_than_a_cell(bits: int, backend: str) -> None:
    """By as much as the ends of a cell differ in every channel; boxes are wrong by far more."""
    x = scored("normal", FP32, bits, 64, 4)
    _, bound_BNW = x.by_cells(backend, *all_of(x.box_P2D))
    extent_PD = (x.box_P2D[:, 1] - x.box_P2D[:, 0]).double() / 2**bits
    cell_NP = torch.einsum("nd,pd->np", x.query_BND[0].double().abs(), extent_PD)
    over_NP = bound_BNW[0].double() - x.exact_NPS.amax(2)
    assert bool((over_NP <= cell_NP * 1.1).all())
    assert float((x.bound_BNW[0].double() - x.exact_NPS.amax(2)).mean()) > 2 * float(over_NP.mean())


@BACKENDS
@DTYPES
@BITS
@SIZES
def test_a_key_in_the_best_corner_has_the_bound_of_the_box(
    width: int, heads: int, bits: int, dtype: torch.dtype, backend: str
) -> None:
    x = scored("normal", dtype, bits, width, heads)
    up_D = x.query_BND[0, 0] >= 0
    x.key_PSD[:, :2] = x.box_P2D
    x.key_PSD[:, 2] = torch.where(up_D, x.box_P2D[:, 1], x.box_P2D[:, 0])
    _, bound_BNW = x.by_cells(backend, *all_of(x.box_P2D))
    torch.testing.assert_close(bound_BNW[0, 0], x.bound_BNW[0, 0], rtol=1e-5, atol=1e-5)


@BACKENDS
@BITS
def test_places_that_are_not_named_keep_their_bounds_and_do_not_rank(
    bits: int, backend: str
) -> None:
    x = scored("normal", BF16, bits, 40, 3)
    place_RW = torch.tensor([[1, 4, 10] + [-1] * 8], dtype=torch.int32)
    rank_BNW, bound_BNW = x.by_cells(backend, place_RW, torch.tensor([3]))
    other_W = torch.ones(11, dtype=torch.bool)
    other_W[[1, 4, 10]] = False
    assert bool((rank_BNW[..., other_W] == -INF).all())
    assert torch.equal(bound_BNW[..., other_W], x.bound_BNW[..., other_W])
    torch.testing.assert_close(rank_BNW[..., ~other_W], bound_BNW[..., ~other_W], rtol=0.02, atol=2)
    assert bool((bound_BNW[..., ~other_W] < x.bound_BNW[..., ~other_W]).all())


@DTYPES
@BITS
@SIZES
@pytest.mark.parametrize("slots", [32, 64, 96, 128])
def test_backends_agree(slots: int, width: int, heads: int, bits: int, dtype: torch.dtype) -> None:
    key_PSD = keys_of("normal", dtype, 30, slots, width)
    query_BND = torch.randn(2, 2 * heads, width)
    box_P2D, _ = bounds_of(key_PSD)
    table_RW = torch.randint(0, 30, (4, 19)).int()
    pages_R, chosen_R = torch.tensor([19, 0, 1, 16]), torch.tensor([9, 0, 1, 16])
    place_RW = torch.full((4, 19), -1, dtype=torch.int32)
    for r, count in enumerate(chosen_R.tolist()):
        some = torch.randperm(int(pages_R[r]))[:count].sort().values
        place_RW[r, :count] = some.int()
    cell_PY = to_cells(cells(key_PSD.float(), box_P2D, bits), bits)
    rows = RowPages(table_RW, pages_R)
    bound_BNW = ops.score_pages(query_BND, box_P2D, rows)
    rest = (rows, Places(place_RW, chosen_R), bound_BNW, bits, slots)
    given, wanted = (
        run_of(backend, "score_cells")(query_BND, box_P2D, cell_PY, *rest)
        for backend in ("operator", "reference")
    )
    for one, other in zip(given, wanted, strict=True):  # factors of 8 bits are wrong by more
        size = float(query_BND.abs().max() * (box_P2D[:, 1] - box_P2D[:, 0]).abs().max())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4 + size * width * 2.0**-7)


@BACKENDS
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_what_is_no_number_keeps_the_bound_of_its_box(number: float, backend: str) -> None:
    x = scored("normal", FP32, 2, 8, 2)
    x.box_P2D[3, :, 5], x.box_P2D[4, 1, 2], x.box_P2D[5, 0, 2] = number, INF, -INF
    x.query_BND[0, 0, 2] = 0
    loose = ops.score_pages(x.query_BND, x.box_P2D, all_of(x.box_P2D))
    _, bound_BNW = x._replace(bound_BNW=loose).by_cells(backend, *all_of(x.box_P2D))
    assert torch.equal(bound_BNW[..., 3:6], loose[..., 3:6])


def test_the_bits_depend_neither_on_threads_nor_on_other_rows() -> None:
    key_PSD = keys_of("normal", BF16, 300, 64, 128)
    query_BND, (box_P2D, _) = torch.randn(2, 8, 128).bfloat16(), bounds_of(key_PSD)
    rows = all_of(box_P2D, rows=4)
    cell_PY = to_cells(cells(key_PSD.float(), box_P2D, 2), 2)
    loose = ops.score_pages(query_BND, box_P2D, rows)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            ops.score_cells(query_BND, box_P2D, cell_PY, rows, Places(*rows), loose, 2, 64)[1]
        )
    assert all(torch.equal(results[0], one) for one in results[1:])
    alone = RowPages(*(x[:2] for x in rows))
    query_BND, loose = query_BND[:1].contiguous(), loose[:1].contiguous()
    given = ops.score_cells(query_BND, box_P2D, cell_PY, alone, Places(*alone), loose, 2, 64)
    assert torch.equal(given[1], results[0][:1])


@BACKENDS
def test_cells_find_the_page_of_the_best_key_where_boxes_do_not(backend: str) -> None:
    """Keys of wide pages: the corner of a box has little to do with any of them."""
    key_PSD, query_BND = torch.randn(200, 32, 64), torch.randn(1, 50, 64)
    box_P2D, length_P2 = bounds_of(key_PSD)
    loose = ops.score_pages(query_BND, box_P2D, all_of(box_P2D))
    x = Scored(key_PSD, query_BND, box_P2D, length_P2, loose, 2)
    rank_BNW, _ = x.by_cells(backend, *all_of(box_P2D))
    best_N1 = x.exact_NPS.amax(2).argmax(1, keepdim=True)
    tenths = [score[0].topk(20).indices for score in (rank_BNW, loose)]
    found = [int((tenth_NK == best_N1).any(1).sum()) for tenth_NK in tenths]
    assert found[0] >= 47 and found[1] <= 22
