"""Layers that read the keys and values of a layer before them.

What that layer saw is kept, dense, until the last of them has attended: by then it has stored its
tokens already, and slots are gone that all of them still see in this pass. They are evicted once,
for all, by what the layer itself observed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.pipe.groups import Group, groups_of, scatter, take
from kvpress.pipe.prompt import candidates
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.store.base import KEY, POSITION, VALUE


class Seen(NamedTuple):
    """What the new tokens of a pass see, group by group; valid_BQ: which of them are real."""

    groups: list[Group]
    columns: list[dict[str, Tensor]]
    valid_BQ: Tensor | None
    left: int  # readers that have not attended yet


def seen_by_readers(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> Seen | None:
    """What the readers of a layer are to see, before it takes new tokens; None: it has none."""
    if not layer.kind.readers:
        return None
    before_B = layer.sequences.seen_B
    new_B = torch.full_like(before_B, tokens.key_bHQD.shape[2])
    new_B = new_B if valid_BQ is None else valid_BQ.sum(1)
    groups = groups_of(layer, new_B, tokens.key_bHQD.shape[2], padded=valid_BQ is not None)
    seen = []
    for group in groups:
        part = take(tokens, group.sequences, valid_BQ)
        columns = candidates(layer, group.sequences, part, before_B[group.sequences])
        seen.append({name: columns[name] for name in (KEY, VALUE, POSITION)})
    return Seen(groups, seen, valid_BQ, layer.kind.readers)


def attend_again(layer: Layer, tokens: Tokens) -> Tensor:
    """The attention output `[B, N, Q, E]` of a reader of the layer. tokens: with its queries."""
    seen: Any = layer.seen
    outputs = []
    for group, columns in zip(seen.groups, seen.columns, strict=True):
        query_bNQD = take(tokens, group.sequences, seen.valid_BQ).query_bNQD
        how = (tokens.scaling, tokens.softcap, layer.kind.window)
        own = (columns[KEY], columns[VALUE], columns[POSITION])
        outputs.append(prompt_attention(query_bNQD, *own, *how, tokens.sink_N))
    layer.seen = seen._replace(left=seen.left - 1) if seen.left > 1 else None
    return scatter(tokens, seen.groups, outputs, seen.valid_BQ)
