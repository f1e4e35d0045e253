"""The tree over pages: how many nodes, and boxes that are unions."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.page_tree import covered, inner_nodes, level_sizes, tree_of


@pytest.mark.parametrize(
    ("places", "sizes"),
    [
        (0, [0]),
        (1, [1]),
        (2, [2, 1]),
        (5, [5, 3, 2, 1]),
        (64, [64, 32, 16, 8, 4, 2, 1]),
        (130, [130, 65, 33, 17, 9, 5, 3]),
    ],
)
def test_roots_are_one_node_or_cover_64_pages(places: int, sizes: list[int]) -> None:
    assert level_sizes(places) == sizes
    assert inner_nodes(places) == sum(sizes[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("places", [1, 2, 3, 7, 64, 131])
def test_a_node_has_the_union_of_its_pages(places: int, dtype: torch.dtype) -> None:
    pages_R = torch.tensor([0, 1, places // 2, places])
    pool = 4 * places + 1
    box_P2D = torch.randn(pool, 2, 6).sort(1).values.to(dtype)
    box_P2D[-1] = torch.nan  # a page that is nobody's
    table_RW = torch.randperm(pool - 1).view(4, places).int()
    table_RW[torch.arange(places) >= pages_R[:, None]] = pool - 1
    tree_RX2D = tree_of(box_P2D, table_RW, pages_R)
    assert tree_RX2D.shape == (4, inner_nodes(places), 2, 6) and tree_RX2D.dtype == dtype
    assert not tree_RX2D.isnan().any()
    for row, pages in enumerate(pages_R.tolist()):
        at = 0
        for level, size in [*enumerate(level_sizes(places))][1:]:
            for index in range(size):
                part = table_RW[row, index << level : min(pages, (index + 1) << level)].long()
                counts = len(part) > 0
                assert bool(covered(places, pages_R)[row, at]) == counts
                low, high = box_P2D[part, 0], box_P2D[part, 1]
                wanted = torch.zeros(2, 6, dtype=dtype)
                if counts:
                    wanted = torch.stack([low.amin(0), high.amax(0)])
                assert torch.equal(tree_RX2D[row, at], wanted)
                at += 1


def test_what_a_table_names_beyond_the_pages_of_a_row_is_not_read() -> None:
    box_P2D = torch.randn(2, 2, 4)
    table_RW = torch.tensor([[1, -7, 2**31 - 1]]).int()
    tree_RX2D = tree_of(box_P2D, table_RW, torch.tensor([1]))
    assert torch.equal(tree_RX2D[0, 0], box_P2D[1]) and not tree_RX2D[0, 1].any()


def test_without_pages_there_is_nothing_to_read() -> None:
    table_RW = torch.zeros(2, 3, dtype=torch.int32)
    tree_RX2D = tree_of(torch.zeros(0, 2, 4), table_RW, torch.zeros(2, dtype=torch.int64))
    assert tree_RX2D.shape == (2, 3, 2, 4) and not tree_RX2D.any()
