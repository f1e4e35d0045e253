"""Which sequences of a batch take the same path in a forward pass, and how their parts come back.

A pass may mean different things to them: a prompt chunk to one, a decode step to another, nothing
but padding to a third.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.together import selecting
from kvpress.pipe.state.tokens import Tokens


class Group(NamedTuple):
    """Sequences that take the same path together, with the same number of new tokens."""

    sequences: list[int]
    decodes: bool


def groups_of(layer: Layer, new_B: Tensor, columns: int, padded: bool) -> list[Group]:
    """Who goes together: everybody where all are alike, otherwise each sequence alone.

    Of one new column, with padding where sequences have met their end, the decode steps that are
    alike go together.
    """
    decodes_B = (new_B == 1) & (layer.sequences.seen_B > 0)
    state_BX = torch.cat(
        [layer.sequences.seen_B[:, None], layer.rows.counts_BH], dim=1
    )  # prompts that start alike are one batch
    if bool(decodes_B.all()):
        state_BX = layer.sequences.decoded.tokens_B[:, None]  # rows of any length decode together
    alike = bool((state_BX == state_BX[:1]).all())
    if not padded and not selecting(layer, not alike):
        return [Group(list(range(len(new_B))), bool(decodes_B.all()))]
    together: dict[tuple[bool, int], list[int]] = {}
    for b, decoded in enumerate(layer.sequences.decoded.tokens_B.tolist()):
        if new_B[b] > 0:
            decodes = bool(decodes_B[b])
            key = (True, decoded) if decodes and columns == 1 else (decodes, -1 - b)
            together.setdefault(key, []).append(b)
    return [Group(group, decodes) for (decodes, _), group in together.items()]


def take(tokens: Tokens, group: list[int], valid_BQ: Tensor | None) -> Tokens:
    """The real tokens of some sequences: of all, of one, or one token of each."""
    query, key, value = tokens.states
    if len(group) < len(key):
        index_b = torch.tensor(group, dtype=torch.int64, device=key.device)
        query, key, value = (x.index_select(0, index_b) for x in (query, key, value))
    if valid_BQ is not None and len(group) == 1:
        real_Q = valid_BQ[group[0]].nonzero().flatten().to(key.device)
        query, key, value = (x.index_select(2, real_Q) for x in (query, key, value))
    return tokens.with_states(query, key, value)


def scatter(
    tokens: Tokens, groups: list[Group], outputs: list[Tensor], valid_BQ: Tensor | None
) -> Tensor:
    """The outputs of groups of a batch, at the columns of their tokens; zeros elsewhere."""
    if valid_BQ is None and len(groups) == 1:
        return outputs[0]
    width = tokens.value_bHQD.shape[-1]
    out_BNQD = tokens.query_bNQD.new_zeros(*tokens.query_bNQD.shape[:3], width)
    for group, out in zip(groups, outputs, strict=True):
        if len(group.sequences) > 1:  # one token of each
            out_BNQD[group.sequences] = out
            continue
        (b,) = group.sequences
        columns = slice(None) if valid_BQ is None else valid_BQ[b].to(out.device)
        out_BNQD[b, :, columns] = out[0]
    return out_BNQD
