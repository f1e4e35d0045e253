"""Operands of `search_pages`: random ones, rows of single numbers, and rows of given boxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from kvpress.csrc.search_pages import Operands
from torch import Tensor

from kvpress.formulas.page_tree import covered, inner_nodes, tree_of
from kvpress.ops import Always, RowPages
from kvpress.ops.operands import grouped, named

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Sizes(NamedTuple):
    """ties: whether all numbers are small whole ones, so that most scores are equal, and exact."""

    batch: int
    heads: int
    group: int
    width: int
    places: int
    dtype: torch.dtype
    ties: bool
    seed: int


SIZES = st.builds(
    Sizes,
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([1, 3, 8, 21, 32]),
    st.one_of(st.integers(1, 20), st.sampled_from([64, 65, 131])),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)


def but(operands: Operands, **others: Any) -> Operands:
    """The same with other ones of these names, those of groups included."""
    values = named(operands)
    assert others.keys() <= values.keys()
    return grouped(Operands, [*(values | others).values()])


def query_of(sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = (sizes.batch, sizes.heads * sizes.group, sizes.width)
    query = torch.randn(shape, generator=generator)
    return (query.round() if sizes.ties else query * 3).to(sizes.dtype)


def make(sizes: Sizes, generator: torch.Generator) -> Operands:
    """A step over ragged rows, of which some have no page; nodes that do not count hold NaN."""
    rows, places = sizes.batch * sizes.heads, sizes.places
    pages_R = torch.randint(0, places + 1, (rows,), generator=generator)
    pages_R[-1] = places
    box = torch.randn(rows * places, 2, sizes.width, generator=generator).sort(1).values
    box_P2D = (box.round() if sizes.ties else box).to(sizes.dtype)
    table_RW = torch.randperm(rows * places, generator=generator).view(rows, places).int()
    tree_RX2D = tree_of(box_P2D, table_RW, pages_R)
    tree_RX2D[~covered(places, pages_R)] = torch.nan
    span_P2 = torch.zeros(rows * places, 2, dtype=torch.int32)
    for row in table_RW.long():
        span_P2[row] = torch.arange(places)[:, None].int() * 4 + torch.tensor([0, 3]).int()
    return Operands(
        query_of(sizes, generator),
        box_P2D,
        RowPages(table_RW, pages_R),
        tree_RX2D,
        torch.full((rows, inner_nodes(places)), -1, dtype=torch.int8),
        Always(
            span_P2,
            torch.full((rows,), int(torch.randint(0, 6, (1,), generator=generator))),
            pages_R * 4 - torch.randint(0, 9, (rows,), generator=generator),
        ),
        torch.randint(-1, places + 2, (rows,), generator=generator),
    )


def line(*keys: float) -> Operands:
    """A row of pages of one key of one channel each, of which one is read; nothing else is."""
    box_P2D = torch.tensor(keys, dtype=torch.float32).view(-1, 1, 1).expand(-1, 2, 1).contiguous()
    table_RW, pages_R = torch.arange(len(keys))[None].int(), torch.tensor([len(keys)])
    none_R, all_R = torch.zeros(1, dtype=torch.int64), torch.full((1,), 2**40)
    state_RX = torch.full((1, inner_nodes(len(keys))), -1, dtype=torch.int8)
    tree_RX2D = tree_of(box_P2D, table_RW, pages_R)
    span_P2 = torch.zeros(len(keys), 2, dtype=torch.int32)
    head = (torch.ones(1, 1, 1), box_P2D, RowPages(table_RW, pages_R), tree_RX2D, state_RX)
    return Operands(*head, Always(span_P2, none_R, all_R), none_R + 1)


def rows_of(query_RGD: Tensor, box_RW2D: Tensor, keep: int) -> Operands:
    """Rows of one sequence. The first page and the last two of each are read anyway."""
    rows, places, _, width = box_RW2D.shape
    box_P2D = box_RW2D.flatten(0, 1)
    table_RW = torch.arange(rows * places).view(rows, places).int()
    pages_R = torch.full((rows,), places)
    state_RX = torch.full((rows, inner_nodes(places)), -1, dtype=torch.int8)
    span_P2 = torch.arange(places).int().repeat(rows)[:, None].expand(-1, 2).contiguous()
    head = (query_RGD.reshape(1, -1, width), box_P2D, RowPages(table_RW, pages_R))
    tree_RX2D = tree_of(box_P2D, table_RW, pages_R)
    one_R = torch.ones_like(pages_R)
    always = Always(span_P2, one_R, pages_R - 2)
    return Operands(*head, tree_RX2D, state_RX, always, one_R * keep)


def boxes_of_keys(centre_RWD: Tensor, spread: float, slots: int = 64) -> Tensor:
    """The boxes of pages of so many keys each, which lie around a centre of their own."""
    low_RWD, high_RWD = centre_RWD + torch.inf, centre_RWD - torch.inf
    for _ in range(slots):
        key_RWD = centre_RWD + spread * torch.randn_like(centre_RWD)
        low_RWD, high_RWD = torch.minimum(low_RWD, key_RWD), torch.maximum(high_RWD, key_RWD)
    return torch.stack([low_RWD, high_RWD], 2)
