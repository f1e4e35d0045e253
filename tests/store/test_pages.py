"""The paged store against a plain list of slots, and its own books."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


class Model:
    """Rows as lists of (position, key, value, mass)."""

    def __init__(self, sequences: int, heads: int) -> None:
        self.rows = [[[] for _ in range(heads)] for _ in range(sequences)]

    def append(self, columns: dict[str, torch.Tensor], valid: torch.Tensor) -> None:
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                for t in valid[b].nonzero().flatten().tolist():
                    names = ("position", "key", "value", "mass")
                    row.append(tuple(columns[n][b, h, t].tolist() for n in names))

    def same_as(self, store: PagedRows) -> bool:
        dense = [store.dense(n) for n in ("position", "key", "value", "mass")]
        for b, heads in enumerate(self.rows):
            for h, row in enumerate(heads):
                count = int(store.counts_BH[b, h])
                held = [tuple(x[b, h, s].tolist() for x in dense) for s in range(count)]
                if sorted(held) != sorted(row):
                    return False
        return store.check_integrity()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_sequences_of_operations_equal_a_list_of_slots(data: st.DataObject) -> None:
    sequences, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    store, model = rows(sequences, heads, data.draw(st.integers(1, 5))), Model(sequences, heads)
    seen = 0
    for _ in range(data.draw(st.integers(1, 8))):
        actions = ["append", "one", "evict", "compact", "select", "write"]
        action = data.draw(st.sampled_from(actions))
        if action in ("append", "one"):
            tokens = 1 if action == "one" else data.draw(st.integers(0, 9))
            columns = fresh(sequences, heads, tokens, seen)
            flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
            valid = torch.tensor([data.draw(flags) for _ in range(sequences)], dtype=torch.bool)
            valid = valid.view(sequences, tokens)
            for b in range(sequences):
                real = valid[b].nonzero().flatten()
                store.append({n: x[b : b + 1, :, real] for n, x in columns.items()}, [b])
            model.append(columns, valid)
            seen += tokens
        elif action == "evict":
            chosen = (store.counts > 0) & (torch.rand(len(store.counts)) < 0.7)
            slot = (torch.rand(len(store.counts)) * store.counts).long()
            victims = store.dense("position").flatten(0, 1)
            for r in chosen.nonzero().flatten().tolist():
                row = model.rows[r // heads][r % heads]
                gone = int(victims[r, slot[r]])
                model.rows[r // heads][r % heads] = [s for s in row if s[0] != gone]
            row = chosen.nonzero().flatten()
            store.evict_one(row, slot[row])
        elif action == "compact":
            columns = store.dense_by_position(range(sequences))
            width = columns["position"].shape[2]
            counts = (store.counts_BH * data.draw(st.floats(0, 1))).long()
            index = torch.arange(width - 1, -1, -1).expand(sequences, heads, width)
            kept = {
                n: x.gather(2, index.view(*index.shape, *[1] * (x.dim() - 3)).expand_as(x))
                for n, x in columns.items()
            }
            store.fill([Survivors(tuple(range(sequences)), kept, counts)], headroom=2)
            for b in range(sequences):
                for h in range(heads):
                    newest = sorted(model.rows[b][h], reverse=True)
                    model.rows[b][h] = newest[: int(counts[b, h])]
        elif action == "select":
            index = data.draw(st.lists(st.integers(0, sequences - 1), min_size=1, max_size=4))
            store = store.select_sequences(index)
            model.rows = [[list(row) for row in model.rows[i]] for i in index]
            sequences = len(index)
        else:
            mass = torch.randn(store.dense("mass").shape)
            store.write("mass", mass)
            position = store.dense("position")
            for b in range(sequences):
                for h in range(heads):
                    where = dict(zip(position[b, h].tolist(), mass[b, h].tolist(), strict=True))
                    model.rows[b][h] = [(*s[:3], where[s[0]]) for s in model.rows[b][h]]
        assert model.same_as(store)


def test_bytes_are_those_of_the_storages_and_shrink_with_compaction() -> None:
    store = rows()
    store.append(fresh(2, 3, 100, 0))
    assert store.nbytes == helpers.live_storages(store)
    before = store.nbytes
    columns = {n: x[:, :, :10] for n, x in store.dense_by_position([0, 1]).items()}
    store.fill([Survivors((0, 1), columns, torch.full((2, 3), 10))])
    assert store.nbytes == helpers.live_storages(store)
    slot = 4 * WIDTH + 2 * 3 + 4 + 4
    assert store.page_bytes() == 4 * slot + 4  # and an entry in the page table
    assert store.nbytes < 0.15 * before
    assert store.pool("key").shape[0] == 6 * 3  # ten slots need three pages of four in each row


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
    store._table[1, 0] = store._table[0, 0]
    with pytest.raises(CacheError, match="do not add up"):
        store.check_integrity()


def test_growth_is_amortised() -> None:
    store = rows(1, 1)
    sizes = set()
    for token in range(2000):
        store.append(fresh(1, 1, 1, token))
        sizes.add(store.pool("key").shape[0])
    assert len(sizes) < 160
    assert store.pool("key").shape[0] * 4 <= 2000 * (1 + 1 / 16)
