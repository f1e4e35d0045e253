"""Attention over the chunks of rows, each by itself: formulas, bits, and chunks without slots."""

from __future__ import annotations

import itertools
from typing import Any

import packing
import pytest
import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Logits, Old, Pages

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INF = float("inf")
CHUNK = 512
BITS = (16, 8, 4, 2)
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])
FORMATS = [
    pytest.param(bits, dtype, queries, id=f"{bits}bits-{str(dtype)[6:]}-Q{queries}")
    for bits, dtype, queries in itertools.product(BITS, (FP32, BF16, FP16), (1, 5))
]
Results = tuple[Tensor, Tensor, Tensor]


def attend(backend: str, *operands: Any) -> Results:
    run = ops.implementation("attend_parts", "reference")
    return (ops.attend_parts if backend == "operator" else run)(*operands)


def recent(counts: list[int], width: int, dtype: torch.dtype, page: int = 16) -> Pages:
    """Recent slots in shuffled pages; memory that holds none is NaN."""
    table_RW = torch.randperm(len(counts) * -(-max(counts) // page)).view(len(counts), -1).int()
    key_PDS = torch.full((table_RW.numel() + 1, width, page), torch.nan).to(dtype)
    value_PSE = torch.full((table_RW.numel() + 1, page, width), torch.nan).to(dtype)
    for row, count in enumerate(counts):
        slot_S = torch.arange(count)
        page_S = table_RW[row].long()[slot_S // page]
        key_PDS[page_S, :, slot_S % page] = torch.randn(count, width).to(dtype)
        value_PSE[page_S, slot_S % page] = torch.randn(count, width).to(dtype)
    return Pages(key_PDS, value_PSE, table_RW, torch.tensor(counts))


def old(bits: int, dtype: torch.dtype, pages: list[int], page: int = 64) -> packing.Part:
    """Rows of pages of old slots with 50 of 64 channels of keys; a fifth of them are holes."""
    layout = packing.layout_of(bits, bits, (64, 64), (50, 64), dtype, page)
    return packing.make_part(layout, pages, dtype, holes=True)


def some(part: packing.Part, rows: list[int], tables: list[list[int]]) -> Old:
    """Rows with other tables: of these rows of a part, these pages."""
    page_PX, keys_RT, values_RU, _, _, position, *rest = part.tensors
    wide = max(map(len, tables))
    table_RW = torch.tensor([[*table, *[10**9] * (wide - len(table))] for table in tables]).int()
    counts_R = torch.tensor([len(table) * part.layout.slots for table in tables])
    channels = [keys_RT[rows], values_RU[rows]]
    table_RW = table_RW.view(len(tables), wide)
    return Old([page_PX, *channels, table_RW, counts_R, position, *rest], list(part.layout))


def joined(parts: list[packing.Part]) -> Old:
    layouts: list[PageLayout] = [part.layout for part in parts]
    return Old([x for part in parts for x in part.tensors], [x for one in layouts for x in one])


def equal(given: Results, wanted: Results) -> bool:
    return all(torch.equal(*pair) for pair in zip(given, wanted, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(("bits", "dtype", "queries"), FORMATS)
def test_chunks_equal_the_reference(
    bits: int, dtype: torch.dtype, queries: int, softcap: float
) -> None:
    parts = [old(bits, dtype, [17, 0, 1, 8]), old(8, dtype, [0, 2, 0, 9], 128)]
    pages = recent([520, 3, 0, 40], 64, dtype)
    operands = (torch.randn(2, 6, queries, 64), pages, Logits(0.125, softcap), True, joined(parts))
    given = ops.attend_parts(*operands)
    wanted = ops.implementation("attend_parts", "reference")(*operands)
    assert given[0].shape == (3 + 3 + 2, 2, 6, queries, 64)
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == FP32
        finite = other.isfinite()
        assert torch.equal(one[~finite], other[~finite])
        size = max(1.0, float(other[finite].abs().max()))
        # Of factors in 16 bits: see csrc/decode_rows/README.md.
        assert float((one - other)[finite].abs().max()) <= 2**-11 * size
    seen = (given[1] > -INF).sum(0).float()
    torch.testing.assert_close(given[2].sum(-1), seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("bits", "dtype", "queries"), FORMATS[::3])
def test_joined_chunks_are_the_attention_of_rows(
    bits: int, dtype: torch.dtype, queries: int, query_dtype: torch.dtype
) -> None:
    pages = recent([1100, 5, 17, 640], 64, dtype)
    query = torch.randn(2, 6, queries, 64).to(query_dtype)
    operands = (query, pages, Logits(0.125), True, joined([old(bits, dtype, [17, 1, 0, 8])]))
    out, lse, weights = ops.attend_parts(*operands)
    whole, whole_lse, whole_weights = ops.decode_rows(*operands)
    together, together_lse = ops.join_parts(out, lse)
    rounded = {FP32: 1e-5, BF16: 1e-2, FP16: 2e-3}[query_dtype]
    torch.testing.assert_close(together.to(query_dtype), whole, rtol=rounded, atol=rounded / 10)
    torch.testing.assert_close(together_lse, whole_lse, rtol=1e-6, atol=1e-6)
    share = (lse - together_lse).exp()
    width = weights.shape[-1]
    starts = [*range(0, 18 * 64, CHUNK), *range(18 * 64, width, CHUNK), width]
    for j, (begin, end) in enumerate(itertools.pairwise(starts)):
        given = weights[..., begin:end] * share[j][..., None]
        torch.testing.assert_close(given, whole_weights[..., begin:end], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("bits", "dtype", "queries"), FORMATS)
def test_chunks_have_the_same_bits_wherever_their_pages_stand(
    bits: int, dtype: torch.dtype, queries: int
) -> None:
    part = old(bits, dtype, [5, 23, 8])  # the second row: 1,472 old slots
    query = torch.randn(3, 3, queries, 64)
    none = Pages(torch.randn(1, 64, 16), torch.randn(1, 16, 64), *recent([0], 64, FP32)[2:])
    none = none._replace(key_PDS=none.key_PDS.to(dtype), value_PSE=none.value_PSE.to(dtype))

    def run(queries: Tensor, old: Old) -> Results:
        rows = len(old.tensors[4])
        table = none.table_RW.new_zeros(rows, 0)
        pages = none._replace(table_RW=table, counts_R=none.counts_R.new_zeros(rows))
        return ops.attend_parts(queries, pages, Logits(0.125), True, old)

    torch.set_num_threads(1)
    table = part.tensors[3][1].tolist()[:23]
    tables = [table[i : i + 8] for i in range(0, 23, 8)]
    whole = run(query[1:2], some(part, [1], [table]))
    assert len(whole[0]) == 3
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert equal(run(query[1:2], some(part, [1], [table])), whole)
        alone = [run(query[1:2], some(part, [1], [x])) for x in tables]
        rows = run(query[1:2].repeat(3, 1, 1, 1), some(part, [1] * 3, tables))
        mixed = run(query, joined([part]))  # among other rows
        for j, (out, lse, weights) in enumerate(alone):
            columns = slice(j * CHUNK, j * CHUNK + weights.shape[-1])
            for other, b in ((rows, slice(j, j + 1)), (mixed, slice(1, 2)), (whole, slice(0, 1))):
                at = 0 if other is rows else j
                assert torch.equal(out[0], other[0][at, b]) and torch.equal(lse[0], other[1][at, b])
            assert torch.equal(weights, whole[2][..., columns])
            assert torch.equal(weights, rows[2][j : j + 1, ..., : weights.shape[-1]])
            assert torch.equal(weights, mixed[2][1:2, ..., columns])


@pytest.mark.parametrize("page", [8, 16, 48], ids=lambda page: f"page{page}")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_recent_chunks_have_the_same_bits_beside_others(dtype: torch.dtype, page: int) -> None:
    counts = [1100, 7, 0, 530]
    pages, part = recent(counts, 64, dtype, page), old(4, dtype, [9, 0, 3, 1])
    query = torch.randn(4, 3, 5, 64)
    together = ops.attend_parts(query, pages, Logits(0.2), True, joined([part]))
    first = -(-10 * 64 // CHUNK)
    for row in range(4):
        torch.set_num_threads(1 + row % 3)
        one = slice(row, row + 1)
        own = pages._replace(table_RW=pages.table_RW[one].contiguous(), counts_R=pages[3][one])
        out, lse, weights = ops.attend_parts(query[one], own, Logits(0.2), True)
        assert torch.equal(out, together[0][first:, one])
        assert torch.equal(lse, together[1][first:, one])
        assert torch.equal(weights, together[2][one, ..., 640:])


@BACKENDS
def test_chunks_without_slots_give_zeros(backend: str) -> None:
    part = old(4, FP32, [16, 0, 3])
    part.tensors[5][part.tensors[3][0, :8].long()] = -1  # all of the first chunk was dropped
    pages = recent([600, 0, 1], 64, FP32)
    operands = (torch.randn(3, 2, 1, 64), pages, Logits(0.2), True, joined([part]))
    out, lse, weights = attend(backend, *operands)
    seen = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]).bool()
    assert torch.equal(lse > -INF, seen[..., None, None].expand_as(lse))
    assert (out[~seen] == 0).all() and (out[seen].abs().amax(-1) > 0).all()
    assert (weights[1] == 0).all() and (weights[0, ..., :CHUNK] == 0).all()
    torch.testing.assert_close(weights.sum(-1), (lse > -INF).sum(0).float(), rtol=1e-5, atol=1e-6)
    again = attend(backend, *operands[:3], False, operands[4])
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    assert again[2].shape == (0,)


@BACKENDS
def test_queries_do_not_see_those_behind_them(backend: str) -> None:
    pages = recent([514, 3], 32, FP32)
    query = torch.randn(1, 4, 5, 32)
    out, lse, weights = attend(backend, query, pages, Logits(0.2), True)
    seen = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    seen[0, 0, 2:, :2] = False  # five queries of three slots
    seen[1, 0, 2:] = False
    seen[1, 0, :2, :3] = False  # of the last chunk's two slots, which are the last two queries
    assert torch.equal(lse > -INF, seen) and (out[~seen] == 0).all()
    assert (weights[0, 0, 3, 513:] == 0).all() and (weights[0, 0, 4, 512:514] > 0).all()
    exact = ops.implementation("decode_rows", "reference")(query, pages, Logits(0.2), False)
    together = ops.join_parts(out, lse)
    for one, other in zip(together, exact, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_rows_without_pages_have_no_chunks(backend: str) -> None:
    pages = recent([1, 1], 32, FP32)
    pages = pages._replace(table_RW=pages.table_RW[:, :0], counts_R=torch.zeros(2).long())
    out, lse, weights = attend(backend, torch.randn(1, 2, 3, 32), pages, Logits(0.2), True)
    assert out.shape == (0, 1, 2, 3, 32) and lse.shape == (0, 1, 2, 3)
    assert weights.shape == (1, 2, 3, 0)
    part = packing.make_part(packing.layout_of(4, 4, (32, 32), (9, 32), FP32), [1, 9], FP32, True)
    found = attend(backend, torch.randn(1, 2, 3, 32), pages, Logits(0.2), True, joined([part]))
    assert found[0].shape == (2, 1, 2, 3, 32) and found[2].shape == (1, 2, 3, 640)
    assert (found[1][1, 0, 0] == -INF).all() and (found[1][:, 0, 1] > -INF).all()


def test_attend_parts_passes_opcheck() -> None:
    part, pages = old(4, FP32, [1, 9]), recent([3, 20], 64, FP32)
    query = torch.randn(1, 4, 1, 64)
    operands = (query, *pages, 0.2, 0.0, True, part.tensors, list(part.layout))
    torch.library.opcheck(torch.ops.kvpress.attend_parts.default, operands)
