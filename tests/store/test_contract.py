"""What every store promises."""

from __future__ import annotations

import pytest
import torch
from packing import layout_of

from kvpress.store import Column, FormattedRows, PackedRows, PagedRows, Rows

COLUMNS = {
    "key": Column((8,), torch.float32, slot_last=True),
    "value": Column((6,), torch.float32),
    "position": Column((), torch.int32),
}
CPU = torch.device("cpu")


def plain() -> PagedRows:
    return PagedRows(2, 1, COLUMNS, 4, CPU)


def formatted() -> FormattedRows:
    layout = layout_of(16, 16, (8, 6), (8, 6), torch.float32, 32, (32, 32))
    return FormattedRows(plain(), [layout], 0, ordered=False)


@pytest.mark.parametrize("make", [plain, formatted])
def test_a_store_has_what_rows_declare(make: type) -> None:
    store = make()
    assert isinstance(store, Rows)
    for name in Rows.__annotations__:
        assert hasattr(store, name), name
    assert store.counts_BH.tolist() == [[0], [0]]
    assert store.refills
    assert store.old() == ([], [])


@pytest.mark.parametrize("slots", [3, 11])
@pytest.mark.parametrize("make", [plain, formatted])
def test_picked_slots_are_those_of_the_dense_form(make: type, slots: int) -> None:
    torch.manual_seed(0)
    store = make()
    position = torch.arange(slots, dtype=torch.int32).expand(2, 1, slots)
    key, value = torch.randn(2, 1, slots, 8), torch.randn(2, 1, slots, 6)
    store.append({"position": position, "key": key, "value": value})
    index = torch.tensor([[[slots - 1, 0]]])
    for name in ("key", "value"):
        picked = store.picked(name, [1], index)
        assert torch.equal(picked, store.dense(name, [1])[:, :, [slots - 1, 0]])


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1]])
@pytest.mark.parametrize("make", [plain, formatted])
def test_tokens_go_to_the_sequences_that_are_named(
    make: type, order: list[int], tokens: int
) -> None:
    store = make()
    key, value = torch.randn(len(order), 1, tokens, 8), torch.randn(len(order), 1, tokens, 6)
    position = torch.arange(tokens, dtype=torch.int32).expand(len(order), 1, tokens)
    store.append({"position": position, "key": key, "value": value}, order)
    assert torch.equal(store.dense("key", order), key)
    assert torch.equal(store.dense("value", order), value)


@pytest.mark.parametrize("on_host", [True, False])
def test_operators_get_the_parts_of_some_sequences(on_host: bool) -> None:
    """Where operators are not on the host, they are told of no holes."""
    layout = layout_of(16, 16, (8, 6), (8, 6), torch.float32, 32, (32, 32))
    store = PackedRows(2, 2, layout, {}, torch.empty(0), ordered=False)
    store.key_channels_RC = torch.arange(8).short().repeat(4, 1)
    store.value_channels_RU = torch.arange(6).short().repeat(4, 1)
    store.dropped[3] = 5
    store.paging.table.on_host = on_host
    page, key, value, table, counts, *_, dropped = store.part([1])
    assert page is store.paging.pages("page")
    assert (len(key), len(value), len(table), len(counts)) == (2, 2, 2, 2)
    assert dropped.tolist() == ([0, 5] if on_host else [])
