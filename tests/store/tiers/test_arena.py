"""Pages of any size find room in one run of bytes, and give it back."""

from __future__ import annotations

import random

import torch

from kvpress.store.tiers.arena import Arena

SIZE, HALF = 4096, 256


def test_pages_are_where_nobody_is_and_as_many_as_find_room() -> None:
    draw, arena = random.Random(0), Arena(SIZE, HALF, torch.device("cpu"))
    owned: dict[int, set[int]] = {48: set(), 64: set(), 100: set()}  # by bytes of a page
    for _ in range(2000):
        width = draw.choice(list(owned))
        if draw.random() < 0.5:
            free = free_pages(owned, width)
            taken = arena.take(count := draw.randrange(12), width).tolist()
            assert taken == free[: len(taken)] and len(taken) == min(count, len(free))
            owned[width] |= set(taken)
        elif owned[width]:
            gone = draw.sample(sorted(owned[width]), draw.randint(0, len(owned[width])))
            arena.give(torch.tensor(gone, dtype=torch.int64), width)
            owned[width] -= set(gone)
        assert arena.used == sum(width * len(pages) for width, pages in owned.items())
    for width, pages in owned.items():
        arena.give(torch.tensor(list(pages), dtype=torch.int64), width)
    assert arena.used == 0 and len(arena.take(SIZE, 1)) == SIZE - 2 * HALF


def free_pages(owned: dict[int, set[int]], width: int) -> list[int]:
    """The pages of a size whose bytes nobody has, in order."""
    held = {
        byte
        for size, pages in owned.items()
        for p in pages
        for byte in range(p * size, (p + 1) * size)
    }
    places = range((SIZE - 2 * HALF) // width)
    return [p for p in places if not held & set(range(p * width, (p + 1) * width))]
