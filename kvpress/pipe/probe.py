"""Tokens that are read behind a text, look at it, and are forgotten: a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.hadamard import turned
from kvpress.formulas.norms import grams, output_norms
from kvpress.formulas.ranking import matched
from kvpress.formulas.sums import Observation, over_group
from kvpress.pipe.pools import bring
from kvpress.pipe.prompt import candidates
from kvpress.pipe.stages.observe import prompt_sums, stored
from kvpress.pipe.state.channels import turns
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import first_query, step
from kvpress.pipe.state.tokens import Tokens
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY

SINKS = 4  # first tokens that every softmax sees


@torch.no_grad()
def run_probe(layer: Layer, group: Sequence[int], tokens: Tokens) -> Tensor:
    """Attention output `[b, N, Q, D]` of a probe of some sequences, of which nothing is stored.

    Where slots are fitted to it, it attends to what then stays: later layers see what they will.
    """
    outs = []
    for i, b in enumerate(group):
        own, fits = tokens.of(i), layer.context.fitting and layer.kind.window is None
        if fits:
            bring(layer, [b], own)
        with layer.timed("second look"):
            seen = None
            if layer.kind.window is None and not fits:
                near = _near(layer, b, own)
                _observe(layer, b, own, near)
                seen = near if layer.context.looks[b].alone else None
            if seen is None:
                seen = candidates(layer, [b], own, layer.sequences.seen_B[[b]])
            outs.append(_attend(layer, own, seen))
    return torch.cat(outs)


def _attend(layer: Layer, tokens: Tokens, columns: dict[str, Tensor]) -> Tensor:
    key, value, position = columns[KEY], columns[VALUE], columns[POSITION]
    scaling, softcap, window = tokens.scaling, tokens.softcap, layer.kind.window
    states = (tokens.query_bNQD, key, value)
    return prompt_attention(*states, position, scaling, softcap, window, tokens.sink_N)


def start_look(layer: Layer, group: Sequence[int]) -> None:
    """Forgets what the last slots of some sequences came with: nothing was observed of them yet."""
    if layer.kind.window is not None or not layer.recipe.accumulates:
        return
    with layer.rows.memory.lock:
        rows = list(group)
        mass_bHS, position_bHS = (layer.rows.dense(name, rows) for name in (MASS, POSITION))
        first_b11 = layer.sequences.looked_B[rows][:, None, None].to(position_bHS.device)
        layer.rows.write(MASS, mass_bHS.masked_fill(position_bHS >= first_b11, 0.0), rows)


def _observe(layer: Layer, b: int, tokens: Tokens, near: dict[str, Tensor]) -> None:
    """Observes the slots that a probe of a sequence is of, and lets the policy keep what it saw."""
    request = layer.recipe.stage("observe").observe(step(layer, b, tokens.query_bNQD.shape[2]))
    if request is None:
        return
    probe, position_1HK = layer.context.looks[b], near[POSITION]
    observed_1HK = over_group(
        _weights(layer, b, tokens, near, request), layer.kind.heads, request.kind
    )
    inside_1HK = (position_1HK >= probe.first) & (position_1HK < probe.last)
    observed_1HK = observed_1HK.where(inside_1HK, 0.0)
    if probe.factors is not None:
        factor_F = observed_1HK.new_tensor(probe.factors)
        place_1HK = (position_1HK - probe.first).clamp(0, len(factor_F) - 1)
        observed_1HK = observed_1HK * factor_F[place_1HK]
    slots = stored(layer, [b], layer.sequences.seen_B[[b]])
    attention_1HS = matched(observed_1HK, position_1HK, slots.position_BHS, 0.0)
    slots = replace(slots, attention_BHS=attention_1HS)
    layer.rows.write(MASS, layer.recipe.stage("accumulate").accumulate(slots).float(), [b])


def _weights(
    layer: Layer, b: int, tokens: Tokens, near: dict[str, Tensor], request: Observation
) -> Tensor:
    """What a probe's queries give to every slot: fp32 `[1, N, K]`."""
    index, new = layer.kind.index, tokens.query_bNQD.shape[2]
    norms = layer.context.norms[index] if request.relative else None
    # Real tokens stand last.
    weight_1Q = None if norms is None else norms.hidden_BQ[b : b + 1, -new:].reciprocal()
    sums_1NK = prompt_sums(
        tokens.query_bNQD,
        near[KEY],
        near[POSITION],
        index,
        request,
        tokens.scaling,
        tokens.softcap,
        weight_BQ=weight_1Q,
        sink_N=tokens.sink_N,
        first=first_query(layer, tokens),
    )
    if norms is None:
        return sums_1NK
    value = near[VALUE] if turns(layer.recipe) == "none" else turned(near[VALUE])
    gram_NEF = grams(norms.weight_CX, value.shape[-1])
    return sums_1NK * output_norms(value, gram_NEF)


def _near(layer: Layer, b: int, tokens: Tokens) -> dict[str, Tensor]:
    """What the observed softmax runs over: sinks, what the probe is of, and the probe, last."""
    probe, rows, new = layer.context.looks[b], layer.rows, tokens.query_bNQD.shape[2]
    position_1HS = rows.dense(POSITION, [b]).long()
    sinks = max(SINKS, int(layer.sequences.sink_B[b]))
    near_1HS = (position_1HS != EMPTY) & (position_1HS < min(sinks, probe.first))
    near_1HS |= (position_1HS >= probe.first) & (position_1HS < probe.last)
    # Rows may have lost different sinks: what is missing stands in front.
    most = int(near_1HS.sum(-1).max())
    index_1HK = near_1HS.to(torch.uint8).argsort(dim=-1, stable=True)[
        ..., near_1HS.shape[2] - most :
    ]
    old_1HK = position_1HS.gather(2, index_1HK)
    old_1HK = old_1HK.masked_fill(~near_1HS.gather(2, index_1HK), EMPTY)
    own_Q = int(layer.sequences.seen_B[b]) + torch.arange(new, device=old_1HK.device)
    own_1HQ = own_Q.expand(1, old_1HK.shape[1], new)
    near = {POSITION: torch.cat([old_1HK, own_1HQ], dim=2)}
    for name, own in ((KEY, tokens.key_bHQD), (VALUE, tokens.value_bHQD)):
        near[name] = torch.cat([rows.picked(name, [b], index_1HK).to(own.dtype), own], dim=2)
    return near
