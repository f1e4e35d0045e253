"""A long cache of one layer, filled through its rows: no model has to read so many tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import torch
from torch import Tensor

import kvpress
from kvpress.pipe.stages.format import pack_due
from kvpress.pipe.state.tokens import Tokens

HEADS, WIDTH = 8, 128
Make = Callable[[int, int], tuple[Tensor, Tensor]]  # first token, tokens -> keys, values [1,H,T,D]


def attached(**caps: str) -> Any:
    """`full` on a model with one layer of 8 KV heads of 128 channels, bf16."""
    fields = {"num_hidden_layers": 1, "head_dim": WIDTH, "max_position_embeddings": 2**21}
    model = helpers.tiny(query_heads=HEADS, kv_heads=HEADS, **fields).to(torch.bfloat16)
    return kvpress.attach(model, "full", **caps)


@torch.no_grad()
def fill(cache: Any, tokens: int, make: Make, chunk: int = 1024) -> None:
    """Appends so many tokens to the one layer of a cache, and packs what becomes old."""
    (layer,) = cache.states
    for first in range(0, tokens, chunk):
        new = min(chunk, tokens - first)
        key, value = make(first, new)
        if layer.store is None:
            layer.start(key, value)
        before_B = layer.sequences.seen_B
        layer.advance(new, before_B + new, False)
        with layer.rows.memory.lock:
            layer.append(Tokens(key, key, value, WIDTH**-0.5, 0.0), [0], before_B)
            pack_due(layer, {0: new})
        layer.prompted_at = layer.columns_seen
        cache.ids.append(torch.full((1, new), 7, dtype=torch.int32))
    layer.context.dirty = None


def tiled(tile_KHTD: Tensor) -> Make:
    """Keys and values that repeat a tile `[2, H, T, D]`, keys turned a little more every time."""

    def make(first: int, tokens: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(first, first + tokens)
        both = tile_KHTD[:, None, :, place % tile_KHTD.shape[2]]
        turn = (1 + place // tile_KHTD.shape[2] % 7 / 16).to(both.dtype)
        return both[0] * turn[:, None], both[1]

    return make


def drawn(tokens: int = 1000) -> Make:
    """Random keys and values, the same for the same place."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, tokens, WIDTH)
    return tiled(torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16())


def attend(cache: Any, query_1NQD: Tensor) -> Tensor:
    """The attention output of some queries over all that the one layer holds."""
    rows = cache.states[0].rows
    with torch.no_grad(), rows.memory.lock:
        return rows.attend(query_1NQD, None, (WIDTH**-0.5, 0.0), False)[0]
