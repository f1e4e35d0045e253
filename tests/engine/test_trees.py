"""Steps that search trees of boxes read what steps that scan all boxes read."""

from __future__ import annotations

import pytest
import torch
from kvpress.bench.sparse import tiled
from torch import Tensor

from kvpress import ops

TOKENS, TOPIC, STEPS = 300 * 32 + 5, 32 * 32, 3  # in pages enough for a tree; pages that are alike


def decoded(recipe: str) -> tuple[list[Tensor], float]:
    """Outputs of some steps of a layer of long topics, and boxes that a row looked at per step."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    topic = drawn(1, 2, TOKENS // TOPIC + 1, 16).repeat_interleave(TOPIC, 2)[:, :, : TOKENS + STEPS]
    key, value = 3 * topic + 0.05 * drawn(*topic.shape), drawn(*topic.shape)
    given = tiled.Tiles(3 * drawn(1, 6, topic.shape[2], 16), key, value)
    own = tiled.layer_of(tiled.Shape(heads=2, group=3, width=16, dtype="float32"), None, recipe)
    tiled.fill(own, given, TOKENS, lambda _: None)
    out = [tiled.step(own, given.tokens(at, at + 1)) for at in range(TOKENS, TOKENS + STEPS)]
    assert own.reads.figures is not None
    return out, own.reads.figures.boxes


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="trees are searched in C++ alone")
@pytest.mark.parametrize(
    "judged", ["cells=0", "cells=2", "cells=4,candidates=2", "cells=0+quant", "cells=2+think+quant"]
)
def test_a_tree_finds_what_a_scan_finds(judged: str) -> None:
    given, opened = decoded(f"leoam:read=640,early=640,{judged}")
    wanted, boxes = decoded(f"quest:dense=0,read=640,recent=64,{judged}")
    assert opened < 0.8 * boxes, "much of a tree stays shut where pages are alike"
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other)
