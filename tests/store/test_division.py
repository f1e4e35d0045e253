"""How rows are divided into pages of old slots and slots that stay as they came."""

from __future__ import annotations

import torch
from packing import layout_of

from kvpress.store import Column
from kvpress.store.division import Division, Held, pages_of

BF16 = torch.bfloat16
COLUMNS = {
    "key": Column((64,), BF16, slot_last=True),
    "value": Column((64,), BF16),
    "position": Column((), torch.int32),
}
PAIR = [layout_of(4, 4, (64, 64), (64, 64), BF16, slots) for slots in (64, 32)]


def held(recent: list[int], old: int = 0, holes: int = 0, format: int = 0) -> Held:
    """Rows that hold the same but for recent slots."""
    rows = [torch.full((len(recent),), n) for n in (old, holes, format)]
    return Held(torch.tensor(recent), *rows)


def test_the_worked_example() -> None:
    """A slot has 260 bytes; pages of 64 have 64 · 76 = 4,864, of 32 with their steps 2,560."""
    division = Division.of(PAIR, 32, COLUMNS, ordered=False)
    assert division == (32, (64, 32), (38, 10), (64, 32))  # 38 · 260 is twice 4,864 and more
    rows = held([20, 31, 200, 231, 1000, 4096])
    assert division.residual_of(rows).tolist() == [0, 0, 6, 7, 31, 32]
    assert division.room(rows).tolist() == [44, 33, 0, 0, 0, 0]
    goes_on, ended = (torch.full((6,), x) for x in (False, True))
    whole = [0, 0, 192, 192, 960, 4032]
    assert division.packed(rows, goes_on).tolist() == whole
    assert division.packed(rows, ended).tolist() == [0, 0, 192, 192, 960, 4032]
    short = rows._replace(format=torch.ones(6, dtype=torch.int64))
    assert division.packed(short, goes_on).tolist() == [0, 0, 192, 224, 960, 4064]
    assert division.packed(short, ended).tolist() == [20, 31, 192, 224, 960, 4064]


def test_pages_without_holes_are_never_begun() -> None:
    division = Division.of(PAIR, 32, COLUMNS, ordered=True)
    assert division.packed(held([127, 128]), torch.tensor([True, True])).tolist() == [64, 64]


def test_no_page_is_begun_that_would_be_packed_again_for_its_holes() -> None:
    division = Division.of(PAIR, 0, COLUMNS, ordered=False)
    ended = torch.tensor([True])
    assert division.packed(held([20], 64, 20, 1), ended).tolist() == [20]  # 20 + 12 of them
    assert division.packed(held([20], 64, 21, 1), ended).tolist() == [0]


def test_pages_name_the_slots_of_rows_and_repeat_the_last_one() -> None:
    pages = pages_of(torch.tensor([3, 0, 5]), torch.tensor([5, 0, 2]), 4)
    assert pages.row_A.tolist() == [0, 0, 2]
    assert pages.slot_AS.tolist() == [[3, 4, 5, 6], [7, 7, 7, 7], [5, 6, 6, 6]]
    assert pages.real_AS.sum(1).tolist() == [4, 1, 2]
