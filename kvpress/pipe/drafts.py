"""Tokens that may still be taken back, as speculative decoding feeds them.

They are stored and attended to at once. What they do to the rows (what the policy adds up, and
evictions) happens when the next forward pass shows which of them stayed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.formulas import sinks
from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.sums import Observation
from kvpress.host import lasting
from kvpress.pipe.evict import evict
from kvpress.pipe.growth import grow
from kvpress.pipe.stages.observe import observe, recall
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import step
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.slots import Slots
from kvpress.store.base import KEY, POSITION, VALUE

_BLOCK = 32  # queries that `decode_rows` takes at once


def run_drafts(layer: Layer, tokens: Tokens) -> Tensor:
    """Attention output `[B, N, Q, D]` of drafted tokens of all sequences, which are then stored."""
    layer.mark_dirty()
    outputs, group = [], list(range(len(layer.sequences)))
    for start in range(0, tokens.key_bHQD.shape[2], _BLOCK):
        block = tokens.part(start, start + _BLOCK)
        new = block.key_bHQD.shape[2]
        with layer.timed("store"):
            layer.append(block, group, layer.sequences.seen_B)
        layer.advance(new, layer.sequences.seen_B + new, padded=False)
        with layer.timed("decode attention"):
            outputs.append(_draft_attention(layer, block))
        layer.sequences.drafts.tokens += new
        if layer.recalled:
            layer.logits = (tokens.scaling, tokens.softcap)
            layer.sequences.drafts.queries.append(block.query_bNQD.detach().clone())
    return torch.cat(outputs, dim=2)


def _draft_attention(layer: Layer, tokens: Tokens) -> Tensor:
    rows = layer.rows
    if layer.kind.window is not None:  # a row is short, and each token sees another part of it
        columns = rows.dense_by_position(range(rows.sequences))
        dtype = tokens.key_bHQD.dtype
        key, value = columns[KEY].to(dtype), columns[VALUE].to(dtype)
        rest = (columns[POSITION], tokens.scaling, tokens.softcap, layer.kind.window)
        return prompt_attention(tokens.query_bNQD, key, value, *rest, tokens.sink_N)
    watched = _request(layer, 0) is not None
    if rows.retrieving is not None:
        layer.context.ledger.note("Drafted tokens attended to all pages.")
    found = rows.attend(tokens.query_bNQD, None, tokens.logits, watched)
    out_bNQD, weights_bNQS = sinks.taken(found, tokens.sink_N)
    if weights_bNQS is not None:
        layer.sequences.drafts.blocks.append(weights_bNQS)
    return out_bNQD


@lasting
@torch.no_grad()
def commit(layer: Layer) -> None:
    """Makes the drafted tokens that were not taken back final: they count as decoded."""
    if layer.sequences.drafts.tokens == 0:
        return
    layer.mark_dirty()
    layer.note_peak()
    tokens, weights, query_BNQD = layer.sequences.drafts.finish()
    everybody = list(range(len(layer.sequences)))
    groups = [everybody] if layer.in_step else [[b] for b in everybody]
    for group in groups:
        part = None if weights is None else weights[group]
        if query_BNQD is not None:
            recall(layer, group, query_BNQD[group])
        _commit(layer, group, tokens, part)
    layer.context.dirty = None


def _commit(layer: Layer, group: list[int], tokens: int, weights_bNQS: Tensor | None) -> None:
    before, interval = (
        layer.sequences.decoded.of(group[0]),
        layer.limits.interval if layer.limits else 0,
    )
    due = interval > 0 and before // interval < (before + tokens) // interval
    if due and layer.grows:
        grow(layer)
    excess_bH = layer.rows.counts_BH[group] - layer.sequences.quota_BH[group]
    evicts = due and bool((excess_bH > 0).any())
    with layer.timed("observe"):
        for token in range(tokens):
            layer.count_decoded(1, group)
            if layer.recipe.gathers or (evicts and token == tokens - 1):
                slots = _observe(layer, group, weights_bNQS, token, tokens)
    if evicts:
        evict(layer, group, slots, excess_bH)


def _observe(
    layer: Layer, group: list[int], weights_bNQS: Tensor | None, token: int, tokens: int
) -> Slots:
    """The slots as one of the tokens leaves them."""
    request, weights_bN1S = _request(layer, group[0]), None
    if weights_bNQS is not None and request is not None:
        weights_bN1S = weights_bNQS[:, :, token : token + 1]
        held = int(layer.rows.counts_BH[group].max()) + layer.kind.sink
        weights_bN1S = F.pad(weights_bN1S, (0, max(0, held - weights_bN1S.shape[-1])))
    seen_b = layer.sequences.seen_B[group] - (tokens - 1 - token)
    return observe(layer, group, weights_bN1S, request, seen_b)


def _request(layer: Layer, sequence: int) -> Observation | None:
    """What the policy wants to know of a decoded token, if it ever uses it."""
    evicts = layer.limits is not None and layer.limits.interval > 0
    if not evicts and not layer.recipe.gathers:
        return None
    return layer.recipe.stage("observe").observe(step(layer, sequence, 1))
