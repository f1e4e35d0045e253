"""One layer of a wide model with very many tokens: filled from tiled real keys, and decoded.

Keys and values are those of a model's layers for a text, its heads side by side until a head is as
wide as asked for, and the text over and over until it is as long. They are stored as a prompt's
are, without its attention, which so many tokens would make quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.bench.common.candidates import FULL
from kvpress.bench.common.prompt import parts
from kvpress.bench.common.text import default_text
from kvpress.bench.sparse.captured import Captured
from torch import Tensor

from kvpress.pipe.forward import run_layer
from kvpress.pipe.stages.format import pack_due
from kvpress.pipe.state.context import Context, Ledger
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.loading import parse
from kvpress.store.tiers.tiers import Tiers
from kvpress.types import LayerKind

_CHUNK = 4096  # tokens that come at once


@dataclass(frozen=True, kw_only=True)
class Shape:
    """KV heads, query heads of each, channels and tokens of the layer; and the text's tokens.

    index: the number of the layer, of which policies may treat the first ones apart.
    """

    heads: int = 8
    group: int = 4
    width: int = 128
    tokens: int = 128_000
    dtype: str = "bfloat16"
    read: int = 2000
    index: int = 0

    @property
    def whole(self) -> int:
        """Bytes of all keys and values."""
        item: int = getattr(torch, self.dtype).itemsize
        return 2 * self.heads * self.width * self.tokens * item


@dataclass(frozen=True)
class Tiles:
    """Queries, keys and values `[1, N or H, T, D]` of a text, to be repeated."""

    query_1NTD: Tensor
    key_1HTD: Tensor
    value_1HTD: Tensor

    def tokens(self, start: int, end: int) -> Tokens:
        """The tokens from number `start` on and before `end`."""
        device = self.key_1HTD.device
        at_Q = torch.arange(start, end, device=device) % self.key_1HTD.shape[2]
        of = (self.query_1NTD, self.key_1HTD, self.value_1HTD)
        query, key, value = (x.index_select(2, at_Q) for x in of)
        return Tokens(query, key, value, key.shape[-1] ** -0.5, 0.0)


def tiles(model: Any, tokenizer: Any, shape: Shape) -> Tiles:
    """What the layers of a model hand over for the beginning of the reference text."""
    ids = parts(model, tokenizer, default_text().content, shape.read, 1)
    captured = Captured(model, ids, set(range(model.config.num_hidden_layers)))
    given = list(captured.layers.values())
    dtype = getattr(torch, shape.dtype)

    def wide(which: int, heads: int) -> Tensor:
        all_XTD = torch.cat([layer[which][0] for layer in given])  # type: ignore[index]
        beside = shape.width // all_XTD.shape[2]
        index = torch.arange(heads * beside, device=all_XTD.device) % len(all_XTD)
        chosen = all_XTD[index].view(heads, beside, *all_XTD.shape[1:])
        made: Tensor = chosen.transpose(1, 2).flatten(2)[None].to(dtype)
        return made

    return Tiles(wide(0, shape.heads * shape.group), wide(1, shape.heads), wide(2, shape.heads))


def layer_of(shape: Shape, tiers: Tiers | None, policy: str = FULL) -> Layer:
    """A layer that holds nothing yet, as a policy has it."""
    recipe = parse(policy)
    kind = LayerKind(
        shape.index,
        shape.heads,
        queries=shape.heads * shape.group,
        width=shape.width,
    )
    context = Context(recipe, 1, 16, 64, Ledger(), getattr(torch, shape.dtype), tiers=tiers)
    layer = Layer(kind, context)
    context.layers = [layer]
    return layer


def fill(layer: Layer, made: Tiles, tokens: int, on_chunk: Callable[[int], None]) -> None:
    """Stores so many tokens as prompts are stored. Raises TierError.

    Sessions that are saved begin with this: whoever loads one goes on with `step`.
    """
    for start in range(0, tokens, _CHUNK):
        end = min(start + _CHUNK, tokens)
        new = made.tokens(start, end)
        if layer.store is None:
            layer.start(new.key_bHQD, new.value_bHQD)
        before_B = layer.sequences.seen_B
        with layer.rows.memory.lock:
            layer.advance(end - start, before_B + (end - start), padded=False)
            layer.append(new, [0], before_B)
            pack_due(layer, {0: end - start})
        on_chunk(end)


def step(layer: Layer, token: Tokens) -> Tensor:
    """The attention output `[1, N, 1, D]` of one more token. Raises TierError."""
    return run_layer(layer, token, None)
