"""The paged store and its own books."""

from __future__ import annotations

import helpers
import pytest
import torch

from kvpress.errors import CacheError
from kvpress.store import Column, PagedRows, Survivors

WIDTH = 4
COLUMNS = {
    "key": Column((WIDTH,), torch.float32),
    "value": Column((3,), torch.float16),
    "mass": Column((), torch.float32, volatile=True),
}


def rows(sequences: int = 2, heads: int = 3, page_slots: int = 4) -> PagedRows:
    return PagedRows(sequences, heads, COLUMNS, page_slots, torch.device("cpu"))


def fresh(sequences: int, heads: int, tokens: int, start: int) -> dict[str, torch.Tensor]:
    position = torch.arange(start, start + tokens).expand(sequences, heads, tokens)
    return {
        "key": torch.randn(sequences, heads, tokens, WIDTH),
        "value": torch.randn(sequences, heads, tokens, 3).half(),
        "mass": torch.randn(sequences, heads, tokens),
        "position": position,
    }


def test_bytes_are_those_of_the_storages_and_shrink_with_compaction() -> None:
    store = rows()
    store.append(fresh(2, 3, 100, 0))
    assert store.memory.nbytes == helpers.live_storages(store)
    before = store.memory.nbytes
    columns = {n: x[:, :, :10] for n, x in store.dense_by_position([0, 1]).items()}
    store.fill([Survivors((0, 1), columns, torch.full((2, 3), 10))])
    assert store.memory.nbytes == helpers.live_storages(store)
    slot = 4 * WIDTH + 2 * 3 + 4 + 4
    assert store.paging.page_bytes() == 4 * slot + 4  # and an entry in the page table
    assert store.memory.nbytes < 0.15 * before
    pages = store.paging.pages("key").shape[0]
    assert pages == 6 * 3  # ten slots need three pages of four in each row


def test_fill_leaves_other_sequences_alone_and_takes_none_twice() -> None:
    store, first = rows(), fresh(2, 3, 7, 0)
    store.append(first)
    part = Survivors((0,), fresh(1, 3, 2, 0), torch.full((1, 3), 2))
    store.fill([part])
    assert store.counts_BH.tolist() == [[2] * 3, [7] * 3]
    assert torch.equal(store.dense("key", [1]), first["key"][1:])
    with pytest.raises(CacheError, match="each of 2 sequences once"):
        store.fill([part, part])


def test_evicting_from_an_empty_row_is_refused() -> None:
    with pytest.raises(CacheError, match="row is empty"):
        rows().evict_one(torch.arange(6), torch.zeros(6, dtype=torch.long))


def test_integrity_notices_a_page_with_two_owners() -> None:
    store = rows()
    store.append(fresh(2, 3, 5, 0))
    assert store.check_integrity()
    store.paging.table.pages_RW[1, 0] = store.paging.table.pages_RW[0, 0]
    with pytest.raises(CacheError, match="do not add up"):
        store.check_integrity()


def test_growth_is_amortised() -> None:
    store = rows(1, 1)
    sizes = set()
    for token in range(2000):
        store.append(fresh(1, 1, 1, token))
        sizes.add(store.paging.pages("key").shape[0])
    assert len(sizes) < 160
    assert store.paging.pages("key").shape[0] * 4 <= 2000 * (1 + 1 / 16)


def test_pages_behind_the_slots_of_shared_rows_are_nobodys_reserve() -> None:
    """After two evictions the next two tokens of each beam go to pages of its own."""
    columns = {name: COLUMNS[name] for name in ("key", "value")}
    store = PagedRows(1, 1, columns, 1, torch.device("cpu"))
    store.append({"position": torch.arange(5).view(1, 1, 5)})
    beams = store.select_sequences([0, 0])
    for _ in range(2):
        beams.evict_one(torch.arange(2), torch.zeros(2, dtype=torch.long))
    before = store.dense("position").tolist()
    for token in range(5, 8):
        beams.paging.reserve_one()
        pages = beams.paging.table.pages_RW[torch.arange(2), beams.counts]
        assert pages[0] != pages[1], token
        beams.paging.pool.by_name["position"][pages.long(), 0] = token
        beams.counts.add_(1)
        beams.count_step(None, False)
    assert store.dense("position").tolist() == before
    assert store.check_integrity()
