"""`decode_rows` against softmax attention written out, over ragged paged rows."""

from __future__ import annotations

import pytest
import torch

from kvpress import ops
from kvpress.ops import Logits
from kvpress.store import Column, PagedRows


def paged(
    counts: list[list[int]], width: int, value_width: int, page: int, dtype: torch.dtype
) -> PagedRows:
    """Ragged rows in a pool whose unused memory is poisoned with NaN."""
    heads = len(counts[0])
    columns = {
        "key": Column((width,), dtype, slot_last=True),
        "value": Column((value_width,), dtype),
    }
    store = PagedRows(len(counts), heads, columns, page, torch.device("cpu"))
    store.paging.reserve(torch.tensor(counts).flatten() + 3)
    for name in ("key", "value"):
        store.paging.pages(name).fill_(torch.nan)
    for b, row in enumerate(counts):
        for h, count in enumerate(row):
            r = b * heads + h
            address = [
                int(store.paging.table.pages_RW[r, s // page]) * page + s % page
                for s in range(count)
            ]
            page_A, slot_A = (
                torch.tensor(address).long() // page,
                torch.tensor(address).long() % page,
            )
            store.paging.pages("key")[page_A, :, slot_A] = torch.randn(count, width).to(dtype)
            store.paging.pages("value")[page_A, slot_A] = torch.randn(count, value_width).to(dtype)
    store.paging.table.set_counts(torch.tensor(counts).flatten())
    return store


def expected(
    query: torch.Tensor, store: PagedRows, scaling: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in float64, row by row."""
    batch, query_heads, queries, _ = query.shape
    key, value = store.dense("key").double(), store.dense("value").double()
    out = torch.zeros(batch, query_heads, queries, value.shape[-1], dtype=torch.double)
    lse = torch.full((batch, query_heads, queries), -torch.inf, dtype=torch.double)
    for b in range(batch):
        for n in range(query_heads):
            h = n // (query_heads // store.heads)
            for q in range(queries):
                slots = int(store.counts_BH[b, h]) - queries + q + 1
                if slots <= 0:
                    continue
                x = key[b, h, :slots] @ query[b, n, q].double() * scaling
                x = torch.tanh(x / softcap) * softcap if softcap else x
                lse[b, n, q] = x.logsumexp(0)
                out[b, n, q] = x.softmax(0) @ value[b, h, :slots]
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_equals_the_formula(width: int, group: int, queries: int, softcap: float) -> None:
    store = paged([[63, 1], [17, 32], [0, 5]], width, width + 8, 16, torch.float32)
    query = torch.randn(3, 2 * group, queries, width)
    pages = store.paging.operands()
    out, lse, weights = ops.decode_rows(query, pages, Logits(0.2, softcap), True)
    wanted_out, wanted_lse = expected(query, store, 0.2, softcap)
    torch.testing.assert_close(out.double(), wanted_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-5)
    total = (wanted_lse > -torch.inf).float()
    torch.testing.assert_close(weights.sum(-1), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_storage_is_accumulated_in_the_query_dtype(dtype: torch.dtype) -> None:
    store = paged([[40, 9]], 32, 32, 8, dtype)
    query = torch.randn(1, 4, 1, 32)
    pages = store.paging.operands()
    out, _, weights = ops.decode_rows(query, pages, Logits(0.2), False)
    torch.testing.assert_close(
        out.double(), expected(query, store, 0.2, 0.0)[0], rtol=1e-4, atol=1e-5
    )
    assert weights.numel() == 0


def test_the_order_of_slots_does_not_matter_for_one_query() -> None:
    torch.manual_seed(0)
    query, order = torch.randn(1, 2, 1, 16), torch.randperm(30)
    key, value = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    outputs = []
    for index in (torch.arange(30), order):
        columns = {
            "key": Column((16,), torch.float32, slot_last=True),
            "value": Column((16,), torch.float32),
        }
        store = PagedRows(1, 2, columns, 4, torch.device("cpu"))
        position = index.expand(1, 2, 30)
        store.append({"key": key[:, :, index], "value": value[:, :, index], "position": position})
        pages = store.paging.operands()
        outputs.append(ops.decode_rows(query, pages, Logits(0.25), False)[0])
    torch.testing.assert_close(*outputs)
