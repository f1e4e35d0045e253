"""Tokens that are read behind a text, look at it, and are forgotten: a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.ranking import gather, matched
from kvpress.formulas.sums import over_group
from kvpress.pipe.prompt import candidates
from kvpress.pipe.stages.observe import prompt_sums, stored
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import step
from kvpress.pipe.state.tokens import Tokens
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY

SINKS = 4  # first tokens that every softmax sees


@torch.no_grad()
def run_probe(layer: Layer, group: Sequence[int], tokens: Tokens) -> Tensor:
    """Attention output `[b, N, Q, D]` of a probe of some sequences, of which nothing is stored."""
    rows = list(group)
    with layer.timed("second look"):
        columns = candidates(layer, rows, tokens, layer.sequences.seen_B[rows])
        out_bNQD = prompt_attention(
            tokens.query_bNQD,
            columns[KEY],
            columns[VALUE],
            columns[POSITION],
            tokens.scaling,
            tokens.softcap,
            layer.kind.window,
        )
        if layer.kind.window is None:
            for i, b in enumerate(rows):
                part = {name: x[i : i + 1] for name, x in columns.items()}
                _observe(layer, b, tokens.of(i), part)
    return out_bNQD


def start_look(layer: Layer, group: Sequence[int]) -> None:
    """Forgets what the last slots of some sequences came with: nothing was observed of them yet."""
    if layer.kind.window is not None or not layer.recipe.accumulates:
        return
    with layer.rows.memory.lock:
        rows = list(group)
        mass_bHS, position_bHS = (layer.rows.dense(name, rows) for name in (MASS, POSITION))
        first_b11 = layer.sequences.looked_B[rows][:, None, None].to(position_bHS.device)
        layer.rows.write(MASS, mass_bHS.masked_fill(position_bHS >= first_b11, 0.0), rows)


def _observe(layer: Layer, b: int, tokens: Tokens, columns: dict[str, Tensor]) -> None:
    """Observes the slots that a probe of a sequence is of, and lets the policy keep what it saw."""
    request = layer.recipe.stage("observe").observe(step(layer, b, tokens.query_bNQD.shape[2]))
    if request is None:
        return
    first, last = layer.context.looks[b]
    key_1HSD, position_1HS = _seen(layer, b, columns, tokens.query_bNQD.shape[2])
    sums_1NS = prompt_sums(
        tokens.query_bNQD,
        key_1HSD,
        position_1HS,
        layer.kind.index,
        request,
        tokens.scaling,
        tokens.softcap,
    )
    observed_1HS = over_group(sums_1NS, layer.kind.heads, request.kind)
    inside_1HS = (position_1HS >= first) & (position_1HS < last)
    observed_1HS = observed_1HS.where(inside_1HS, 0.0)
    slots = stored(layer, [b], layer.sequences.seen_B[[b]])
    attention_1HS = matched(observed_1HS, position_1HS, slots.position_BHS, 0.0)
    slots = replace(slots, attention_BHS=attention_1HS)
    layer.rows.write(MASS, layer.recipe.stage("accumulate").accumulate(slots).float(), [b])


def _seen(layer: Layer, b: int, columns: dict[str, Tensor], new: int) -> tuple[Tensor, Tensor]:
    """Keys and positions of what the observed softmax runs over: sinks, the range, the probe."""
    first, last = layer.context.looks[b]
    position_1HS = columns[POSITION]
    sinks = max(SINKS, int(layer.sequences.sink_B[b]))
    seen_1HS = (position_1HS != EMPTY) & (position_1HS < min(sinks, first))
    seen_1HS |= (position_1HS >= first) & (position_1HS < last)
    seen_1HS[..., -new:] = True
    # Rows may have lost different sinks: what is missing stands in front, the probe at the end.
    width = int(seen_1HS.sum(-1).max())
    index_1HK = seen_1HS.to(torch.uint8).argsort(dim=-1, stable=True)[..., -width:]
    there_1HK = seen_1HS.gather(2, index_1HK)
    position_1HK = position_1HS.gather(2, index_1HK).masked_fill(~there_1HK, EMPTY)
    return gather(columns[KEY], index_1HK), position_1HK
