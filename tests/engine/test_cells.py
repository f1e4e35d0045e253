"""Which pages a step reads, against the documented rule in 64 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpress.bench.sparse import tiled
from torch import Tensor

from kvpress.store.base import KEY

PAGES, SLOTS, OPEN, READ, WIDTH = 60, 32, 5, 400, 16
KEEP = (READ - OPEN - 1) // SLOTS  # pages, beside the open one and the new token
NEAR = 0.2  # factors are rounded to bytes: pages that differ by less may be taken for each other


def one_step(recipe: str) -> tuple[Any, Tensor]:
    """A layer of two KV heads of three query heads after a step, and its query `[6, D]`."""
    generator = torch.Generator().manual_seed(3)

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, heads, PAGES * SLOTS + OPEN + 1, WIDTH, generator=generator)

    given = tiled.Tiles(drawn(6), drawn(2), drawn(2))
    own = tiled.layer_of(tiled.Shape(heads=2, group=3, width=WIDTH, dtype="float32"), None, recipe)
    tiled.fill(own, given, PAGES * SLOTS + OPEN, lambda _: None)
    token = given.tokens(PAGES * SLOTS + OPEN, PAGES * SLOTS + OPEN + 1)
    tiled.step(own, token)
    return own, token.query_bNQD[0, :, 0].double()


def relative(bound_GW: Tensor) -> Tensor:
    """By what pages rank: the largest bound relative to the best of its query head."""
    return (bound_GW - bound_GW.amax(1, keepdim=True)).amax(0)


def cell_bounds(query_GD: Tensor, key_WSD: Tensor, bits: int) -> Tensor:
    """The largest product of a query with a corner of the cell of a key of each page."""
    low_W1D, high_W1D = key_WSD.amin(1, keepdim=True), key_WSD.amax(1, keepdim=True)
    part_W1D = (high_W1D - low_W1D) / 2**bits
    cell_WSD = ((key_WSD - low_W1D) / part_W1D).floor().clamp(0, 2**bits - 1)
    ends = (low_W1D + (cell_WSD + more) * part_W1D for more in (0, 1))
    products = [query_GD[:, None, None] * end_WSD for end_WSD in ends]
    return torch.maximum(*products).sum(-1).amax(2)


@pytest.mark.parametrize("bits", [0, 2, 4])
@pytest.mark.parametrize("candidates", [1, 2, 4, None])
@pytest.mark.parametrize("policy", ["quest:dense=0", "leoam:early=400"])
def test_a_step_reads_what_the_rule_says(policy: str, candidates: int | None, bits: int) -> None:
    rest = f"read={READ},sink=0,recent=0,cells={bits},candidates={candidates}".lower()
    layer, query_ND = one_step(f"{policy},{rest}")
    _, found = layer.reads.last
    key_HWSD = layer.rows.dense(KEY)[0, :, : PAGES * SLOTS].double().view(2, PAGES, SLOTS, WIDTH)
    (own,) = found.chosen
    for head, key_WSD in enumerate(key_HWSD):
        query_GD, read = query_ND[3 * head : 3 * head + 3], own.place_rW[head]
        read_W = torch.zeros(PAGES, dtype=torch.bool)
        read_W[read[read >= 0].long()] = True
        assert int(read_W.sum()) == KEEP
        box_GW = cell_bounds(query_GD, key_WSD, 0)
        if not bits:
            rank_W, most = relative(box_GW), PAGES
        else:
            most = PAGES if candidates is None else min(PAGES, KEEP * candidates)
            named_W = relative(box_GW).argsort(descending=True)[:most]
            fine_GW = torch.full_like(box_GW, -torch.inf)
            fine_GW[:, named_W] = cell_bounds(query_GD, key_WSD, bits)[:, named_W]
            rank_W = relative(fine_GW)
        worst, best_left = rank_W[read_W].amin(), rank_W[~read_W].amax()
        assert worst >= best_left - (NEAR if bits else 1e-6)
        assert most > KEEP or bool((rank_W[~read_W] == -torch.inf).all())
