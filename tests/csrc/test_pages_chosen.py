"""Bounds of pages, the choice among them, and what it misses: bounds that no rounding breaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from boxes import (
    BACKENDS,
    BF16,
    DTYPES,
    FP16,
    FP32,
    INF,
    KINDS,
    NAN,
    all_of,
    bounds_of,
    boxes_and_keys,
    keys_of,
    run_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.csrc.missed_mass.reference import slack
from torch import Tensor

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.ops import Always, Logits, Places, RowPages

GROUPS = [(1, 1), (7, 3), (16, 8), (40, 4), (80, 5), (128, 4), (256, 1)]  # channels, query heads


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "heads"), GROUPS, ids=str)
def test_no_key_of_a_page_gives_a_larger_product(
    width: int, heads: int, kind: str, dtype: torch.dtype, backend: str
) -> None:
    """To the last bit: a page of one slot is the product with its key."""
    key_PSD = keys_of(kind, dtype, 11, 6, width)
    box_P2D = boxes_and_keys(key_PSD)
    for query_dtype, query_kind in itertools.product((FP32, dtype), ("normal", kind)):
        query_BND = keys_of(query_kind, query_dtype, 1, heads, width)
        bound = run_of(backend, "score_pages")(query_BND, box_P2D, all_of(box_P2D))
        assert not bound.isnan().any()
        page_NP1, alone_NPS = bound[0, :, :11, None], bound[0, :, 11:].view(heads, 11, 6)
        assert bool((page_NP1 >= alone_NPS).all())
        if kind == "equal":
            assert torch.equal(page_NP1.expand_as(alone_NPS), alone_NPS)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", ["normal", "alike", "equal", "denormal", "zeros", "mixed"])
@pytest.mark.parametrize(("width", "heads"), GROUPS, ids=str)
def test_with_its_slack_a_bound_holds_for_products_in_64_bits(
    width: int, heads: int, kind: str, dtype: torch.dtype, backend: str
) -> None:
    key_PSD = keys_of(kind, dtype, 11, 6, width)
    box_P2D, length_P2 = bounds_of(key_PSD)
    query_BND = keys_of("mixed", dtype, 1, heads, width)
    bound_BNW = run_of(backend, "score_pages")(query_BND, box_P2D, all_of(box_P2D))
    exact_NPS = torch.einsum("nd,psd->nps", query_BND[0].double(), key_PSD.double())
    error, _ = slack(width, 11, 1)
    size_N1 = query_BND[0].double().norm(dim=1)[:, None] * error
    slack_NP = size_N1 * length_P2[:, 0].double()
    slack_NP += width * 2.0**-149  # products may be smaller than any number
    given_NP = bound_BNW[0].double()
    assert bool((given_NP + slack_NP >= exact_NPS.amax(2)).all())
    assert bool(((given_NP - exact_bounds(query_BND[0], box_P2D)).abs() <= slack_NP).all())


def exact_bounds(query_ND: Tensor, box_P2D: Tensor) -> Tensor:
    query_N1D, box_P2D = query_ND.double()[:, None], box_P2D.double()
    return torch.maximum(query_N1D * box_P2D[:, 0], query_N1D * box_P2D[:, 1]).sum(2)


@BACKENDS
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bounds_hold_for_the_keys_that_packed_pages_give(bits: int, backend: str) -> None:
    """And are broken where boxes are taken before packing: then queries of one channel show it."""
    box_P2D, key_PSD, raw_PSD = packed_boxes(bits)
    one_BND = torch.cat([torch.eye(16), -torch.eye(16)])[None]
    query_BND = torch.cat([one_BND, torch.randn(1, 32, 16)], 1)
    alone_P2D = key_PSD.flatten(0, 1)[:, None].expand(-1, 2, -1)
    raw_P2D = torch.stack([raw_PSD.amin(1), raw_PSD.amax(1)], 1)
    pages = len(box_P2D)
    pool = torch.cat([box_P2D, raw_P2D, alone_P2D]).contiguous()
    bound = run_of(backend, "score_pages")(query_BND, pool, all_of(pool))[0]
    alone_NPS = bound[:, 2 * pages :].view(len(bound), pages, -1)
    assert bool((bound[:, :pages, None] >= alone_NPS).all())
    assert bool((bound[:, pages : 2 * pages, None] < alone_NPS).any())


def packed_boxes(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of `page_bounds`, the keys that pages hold, and those that they were made of."""
    import packing
    from kvpress.csrc.unpack.reference import numbers

    layout = packing.layout_of(bits, 16, (16, 8), (16, 8), FP32, 64, (32, 32))
    raw_PSD, value_PSE = torch.randn(9, 64, 16), torch.randn(9, 64, 8)
    channels = [torch.arange(n, dtype=torch.int16).repeat(9, 1) for n in (16, 8)]
    page_PX = ops.pack(raw_PSD, value_PSE, *channels, list(layout))
    box_P2D, _, _ = ops.page_bounds(page_PX, *channels, list(layout), raw_PSD, 0)
    return box_P2D, numbers(page_PX, *channels, layout, FP32)[0], raw_PSD


@DTYPES
@pytest.mark.parametrize("query_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("width", "heads"), [*GROUPS, (96, 13)], ids=str)
def test_backends_agree_on_bounds(
    width: int, heads: int, query_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    box_P2D, _ = bounds_of(keys_of("normal", dtype, 150, 3, width))
    query_BND = torch.randn(2, 2 * heads, width).to(query_dtype)
    table_RW = torch.randint(0, 150, (4, 77)).int()
    pages_R = torch.tensor([77, 0, 1, 64])
    operands = (query_BND, box_P2D, RowPages(table_RW, pages_R))
    given = ops.score_pages(*operands)
    wanted = ops.implementation("score_pages", "reference")(*operands)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-4)
    beyond_RW = torch.arange(77) >= pages_R[:, None]
    assert bool((given.view(4, heads, 77).transpose(1, 2)[beyond_RW] == -INF).all())


@BACKENDS
def test_what_would_be_no_number_is_infinite(backend: str) -> None:
    box_P2D = torch.ones(4, 2, 5)
    box_P2D[0, 1, 2], box_P2D[1, 0, 3], box_P2D[2, :, 4] = NAN, -INF, INF
    query = torch.ones(1, 2, 5)
    query[0, 0, 3], query[0, 1, 4] = -1, 0
    bound = run_of(backend, "score_pages")(query, box_P2D, all_of(box_P2D))
    assert torch.equal(bound[0], torch.tensor([[INF, INF, INF, 3.0], [INF, 4.0, INF, 4.0]]))


def choice(backend: str, bound_BNW: Tensor, keep: Any, **given: Any) -> list[list[int]]:
    """The places that are chosen of every row; spans are those of pages of 16 slots in order."""
    rows, places = given.pop("rows", 1), bound_BNW.shape[2]
    table_RW = torch.arange(rows * places).view(rows, places).int()
    first = (torch.arange(rows * places) % max(1, places) * 16).int()
    numbers = {"pages": places, "sink": 0, "start": 10**6, **given, "keep": keep}
    books = {
        name: torch.tensor(x if isinstance(x, list) else [x] * rows).long()
        for name, x in numbers.items()
    }
    always = Always(torch.stack([first, first + 15], 1), books["sink"], books["start"])
    operands = (bound_BNW, RowPages(table_RW, books["pages"]), always, books["keep"])
    place_RW, chosen_R = run_of(backend, "choose_pages")(*operands)
    assert place_RW.dtype == torch.int32 and chosen_R.dtype == torch.int64
    found = []
    for place_W, count in zip(place_RW.tolist(), chosen_R.tolist(), strict=True):
        assert place_W[count:] == [-1] * (places - count) and -1 not in place_W[:count]
        assert place_W[:count] == sorted(set(place_W[:count]))
        found.append(place_W[:count])
    return found


@BACKENDS
def test_the_best_pages_are_chosen_and_of_equal_ones_the_first(backend: str) -> None:
    bound = torch.tensor([[[3.0, 5.0, 5.0, 1.0, 5.0, 4.0]]])
    for keep, wanted in ((0, []), (1, [1]), (2, [1, 2]), (4, [1, 2, 4, 5]), (9, list(range(6)))):
        assert choice(backend, bound, keep) == [wanted]
    assert choice(backend, bound, -5) == [[]]
    assert choice(backend, torch.zeros(1, 3, 6), 4) == [[0, 1, 2, 3]]


@BACKENDS
def test_first_and_last_positions_are_always_read(backend: str) -> None:
    bound = torch.tensor([[[0.0, 9.0, 1.0, 2.0, 8.0, 0.0]]])
    assert choice(backend, bound, 0, sink=1) == [[0]]
    assert choice(backend, bound, 0, sink=17) == [[0, 1]]
    assert choice(backend, bound, 0, start=95) == [[5]] and choice(backend, bound, 0, start=79) == [
        [4, 5]
    ]
    assert choice(backend, bound, 3, sink=4, start=95) == [[0, 1, 5]]
    assert choice(backend, bound, 2, sink=4, start=70) == [[0, 4, 5]]
    assert choice(backend, bound, 3, sink=4, start=0) == [list(range(6))]


@BACKENDS
def test_pages_rank_relative_to_the_best_of_a_query_head(backend: str) -> None:
    bound = torch.tensor([[[1000.0, 900.0, 800.0, 0.0], [0.1, 0.2, 0.3, 2.0]]])
    assert choice(backend, bound, 2) == [[0, 3]]


@BACKENDS
def test_rows_choose_for_themselves(backend: str) -> None:
    bound = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]], [[1.0, 2.0, 0.0], [7.0, 8.0, 9.0]]])
    given = {"rows": 4, "pages": [3, 2, 3, 0], "sink": [0, 0, 1, 0]}
    assert choice(backend, bound, [1, 1, 2, 1], **given) == [[2], [0], [0, 1], []]


@BACKENDS
def test_infinite_bounds_and_no_numbers_are_read_first(backend: str) -> None:
    bound = torch.tensor([[[1.0, NAN, 3.0, INF, -INF], [5.0, 1.0, 1.0, 1.0, 1.0]]])
    assert choice(backend, bound, 2) == [[0, 1]] and choice(backend, bound, 3) == [[0, 1, 3]]
    nothing = torch.full((1, 1, 5), -INF)
    assert choice(backend, nothing, 2) == [[0, 1]]
    assert choice(backend, nothing[..., :0], 2) == [[]]


@pytest.mark.parametrize("places", [1, 7, 8, 9, 33, 512, 1000])
def test_backends_choose_the_same(places: int) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        bound = torch.randn(2, 6, places) * 10.0 ** torch.randint(-3, 4, (2, 6, 1))
        bound = bound.round() if seed % 2 else bound
        given = {"rows": 4, "pages": torch.randint(0, places + 1, (4,)).tolist()}
        given |= {"sink": torch.randint(0, 40, (4,)).tolist()}
        given |= {"start": torch.randint(places * 8, places * 17, (4,)).tolist()}
        keep = torch.randint(0, places + 2, (4,)).tolist()
        assert choice("operator", bound, keep, **given) == choice("reference", bound, keep, **given)


def hard_group(seed: int, group: int, places: int) -> Tensor:
    """Bounds of query heads whose sizes differ: log-normal, as in the worst groups of models."""
    torch.manual_seed(seed)
    scale_N1 = (torch.randn(group, 1) * 2).exp()
    return (torch.stack([torch.randperm(places) for _ in range(group)]) * scale_N1)[None]


@BACKENDS
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 40), st.integers(0, 20))
def test_every_query_head_finds_its_best_page(
    backend: str, seed: int, group: int, more: int, spare: int
) -> None:
    bound_1NW = hard_group(seed, group, group + more)
    ((*places,),) = choice(backend, bound_1NW, group + spare)
    assert set(bound_1NW[0].argmax(1).tolist()) <= set(places)


@pytest.mark.parametrize(
    "aggregate", [lambda x: x.amax(0), lambda x: x.mean(0)], ids=["max", "mean"]
)
def test_plain_aggregation_misses_best_pages(aggregate: Callable[[Tensor], Tensor]) -> None:
    """Why ranks are relative: one head of large logits would fill the budget of its group."""
    missed = 0
    for seed in range(200):
        bound_1NW = hard_group(seed, 4, 64)
        places = aggregate(bound_1NW[0]).topk(4).indices.tolist()
        missed += not set(bound_1NW[0].argmax(1).tolist()) <= set(places)
    assert missed > 100


class Attention:
    """Pages of keys and values, queries, a choice, and what it misses in 64 bits."""

    def __init__(self, backend: str, key_PSD: Tensor, query_BND: Tensor, logits: Logits) -> None:
        self.key_PSD, self.logits = key_PSD, logits
        self.value_PSE = torch.randn(*key_PSD.shape[:2], 5)
        (pages, slots, _), self.query_ND = key_PSD.shape, query_BND[0]
        box_P2D, length_P2 = bounds_of(key_PSD, self.value_PSE)
        rows = all_of(box_P2D)
        self.bound = run_of(backend, "score_pages")(query_BND, box_P2D, rows)
        chosen = Places(torch.full_like(rows.table_RW, -1), torch.zeros_like(rows.pages_R))

        def miss(*places: int) -> tuple[Tensor, float]:
            chosen.place_RW[0, : len(places)] = torch.tensor(places).int()
            chosen.chosen_R[0] = len(places)
            operands = (query_BND, self.bound, rows, chosen, length_P2, logits, slots)
            mass_BN, length_R = run_of(backend, "missed_mass")(*operands)
            return mass_BN[0], float(length_R)

        self.miss, self.pages = miss, pages

    def logits_NPS(self) -> Tensor:
        products = torch.einsum("nd,psd->nps", self.query_ND.double(), self.key_PSD.double())
        scaling, cap = self.logits
        return torch.tanh(products * scaling / cap) * cap if cap else products * scaling

    def certify(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """The certificate and the true omitted mass; the outputs differ by as much at most."""
        mass_N, longest = self.miss(*places)
        logits_NPS, read_P = self.logits_NPS(), torch.zeros(self.pages, dtype=torch.bool)
        read_P[places] = True
        weight_NX = logits_NPS.flatten(1).softmax(1).view_as(logits_NPS)
        omitted_N = weight_NX[:, ~read_P].sum((1, 2)) * (1 - 1e-12)  # 64 bits are rounded too
        z_N = logits_NPS[:, read_P].flatten(1).logsumexp(1)
        assert not mass_N.isnan().any() and not (mass_N == INF).any()
        certificate_N = (mass_N.double() - torch.logaddexp(z_N, mass_N.double())).exp()
        out_NE = torch.einsum("nps,pse->ne", weight_NX, self.value_PSE.double())
        own_NX = logits_NPS[:, read_P].flatten(1).softmax(1)
        own_NE = own_NX @ self.value_PSE[read_P].double().flatten(0, 1)
        allowed_N = certificate_N * (longest + own_NE.norm(dim=1)) + 1e-12
        assert bool(((out_NE - own_NE).norm(dim=1) <= allowed_N).all())
        exact = float(self.value_PSE[~read_P].double().norm(dim=2).max()) if longest else 0.0
        assert longest >= exact and longest == pytest.approx(exact, rel=1e-3)
        return certificate_N, omitted_N


@BACKENDS
@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("kind", ["normal", "alike", "equal", "denormal", "zeros", "mixed"])
def test_the_certificate_is_never_below_the_mass_that_is_missed(
    kind: str, softcap: float, dtype: torch.dtype, backend: str
) -> None:
    for scaling in (1e-3, 0.1, 3.0):
        key_PSD, query_BND = keys_of(kind, dtype, 23, 4, 24), torch.randn(1, 3, 24).to(dtype)
        attention = Attention(backend, key_PSD, query_BND, Logits(scaling, softcap))
        for count in (1, 7, 22):
            places = sorted(torch.randperm(23)[:count].tolist())
            certificate_N, omitted_N = attention.certify(places)
            assert bool((certificate_N >= omitted_N).all())
            assert bool((certificate_N <= 1).all())
            if kind in ("equal", "zeros") and dtype == FP32 and scaling < 1:
                assert bool((certificate_N <= omitted_N * 1.001 + 1e-9).all())  # tight boxes


@BACKENDS
def test_nothing_is_missed_where_all_is_read(backend: str) -> None:
    query = torch.randn(1, 3, 8)
    attention = Attention(backend, torch.randn(5, 2, 8), query, Logits(0.3))
    mass_N, longest = attention.miss(*range(5))
    assert bool((mass_N == -INF).all()) and longest == 0
    certificate_N, omitted_N = attention.certify(list(range(5)))
    assert not certificate_N.any() and not omitted_N.any()


@BACKENDS
@pytest.mark.parametrize("sign", [1, -1])
def test_certificates_of_large_logits_are_numbers(sign: int, backend: str) -> None:
    """±1e4, in 64 and in 32 bits; and bounds that are infinite, of keys that are too large."""
    key_PSD = torch.randn(9, 4, 16)
    key_PSD[4] *= 0
    query_BND = sign * torch.ones(1, 2, 16) * 1e4 / 16
    attention = Attention(backend, key_PSD, query_BND, Logits(1.0))
    for places in ([0], [4], [0, 1, 2, 3, 5, 6, 7, 8]):
        certificate_N, omitted_N = attention.certify(places)
        assert bool((certificate_N >= omitted_N).all())
        mass_N, _ = attention.miss(*places)
        z_N = attention.logits_NPS()[:, places].flatten(1).logsumexp(1).float()
        narrow_N = (mass_N - torch.logaddexp(z_N, mass_N)).exp()
        assert bool((narrow_N >= omitted_N.float()).all())
    attention.bound[0, 0, 3], attention.bound[0, 1, 5] = INF, NAN
    mass_N, _ = attention.miss(0)
    assert bool((mass_N == torch.finfo(FP32).max).all())
    assert bool(((mass_N - torch.logaddexp(z_N, mass_N)).exp() == 1).all())


@BACKENDS
def test_pages_beyond_a_row_are_not_missed(backend: str) -> None:
    run = run_of(backend, "missed_mass")
    bound, query = torch.zeros(1, 2, 6), torch.zeros(1, 2, 4)
    table_RW = torch.tensor([[0, 1, 2, -7, 99, 3], [3, 2, 1, 0, 0, 0]]).int()
    place_RW = torch.tensor([[2, -1, -1, -1, -1, -1], [-1] * 6]).int()
    length_P2 = torch.tensor([[1.0, 4.0], [1.0, 3.0], [1.0, 9.0], [1.0, 2.0]])
    rows, read = RowPages(table_RW, torch.tensor([3, 1])), Places(place_RW, torch.tensor([1, 0]))
    mass_BN, length_R = run(query, bound, rows, read, length_P2, Logits(1.0), 16)
    torch.testing.assert_close(mass_BN, torch.tensor([[32.0, 16.0]]).log(), rtol=1e-3, atol=0)
    assert length_R.tolist() == [4.0, 2.0]


def step(sequences: slice, threads: int) -> list[Tensor]:
    """A step of some sequences of a batch of 5: its bounds, its choice and what that misses."""
    torch.manual_seed(3)
    torch.set_num_threads(threads)
    heads, group, width, places, pages = 4, 4, 128, 130, 600
    box_P2D, length_P2 = bounds_of(torch.randn(pages, 3, width).to(BF16))
    query_BND = torch.randn(5, heads * group, width).to(BF16)[sequences].contiguous()
    table_BHW = torch.randint(0, pages, (5, heads, places)).int()
    pages_BH = torch.randint(0, places + 1, (5, heads))
    keep_BH = torch.randint(0, 90, (5, heads))
    span_P2 = torch.randint(0, 999, (pages, 2)).sort(1).values.int()
    table_RW = table_BHW[sequences].flatten(0, 1).contiguous()
    pages_R, keep_R = (x[sequences].flatten().contiguous() for x in (pages_BH, keep_BH))
    rows = RowPages(table_RW, pages_R)
    bound = ops.score_pages(query_BND, box_P2D, rows)
    always = Always(span_P2, torch.full_like(pages_R, 9), torch.full_like(pages_R, 990))
    chosen = Places(*ops.choose_pages(bound, rows, always, keep_R))
    missed = ops.missed_mass(query_BND, bound, rows, chosen, length_P2, Logits(0.1), 3)
    found = [bound, *chosen, *missed]
    return [x.view(len(query_BND), -1) for x in found]


def test_the_bits_depend_neither_on_threads_nor_on_the_batch() -> None:
    whole = step(slice(0, 5), 1)
    for threads in (2, 3, 7):
        for one, other in zip(step(slice(0, 5), threads), whole, strict=True):
            assert torch.equal(one, other)
    for b in range(5):
        for one, other in zip(step(slice(b, b + 1), 1), whole, strict=True):
            assert torch.equal(one, other[b : b + 1])


@BACKENDS
def test_pages_that_do_not_exist_are_refused(backend: str) -> None:
    query, box_P2D = torch.randn(1, 2, 4), torch.randn(3, 2, 4)
    for table, pages in (([[0, 3]], [2]), ([[-1, 0]], [1]), ([[0, 0]], [3]), ([[0, 0]], [-1])):
        with pytest.raises(OperatorError):
            rows = RowPages(torch.tensor(table).int(), torch.tensor(pages))
            run_of(backend, "score_pages")(query, box_P2D, rows)
    unread = RowPages(torch.tensor([[2, 99]]).int(), torch.tensor([1]))
    assert run_of(backend, "score_pages")(query, box_P2D, unread).shape == (1, 2, 2)


@BACKENDS
@pytest.mark.parametrize(
    ("scaling", "slots"), [(0.0, 1), (-1.0, 1), (NAN, 1), (1.0, 0), (1.0, 2**31)]
)
def test_numbers_of_which_nothing_is_a_bound(scaling: float, slots: int, backend: str) -> None:
    rows = RowPages(torch.zeros(1, 1).int(), torch.ones(1).long())
    given = (torch.zeros(1, 1, 4), torch.zeros(1, 1, 1), rows, Places(*rows), torch.zeros(1, 2))
    with pytest.raises(OperatorError, match=r"scaling is|slots is"):
        run_of(backend, "missed_mass")(*given, Logits(scaling), slots)
