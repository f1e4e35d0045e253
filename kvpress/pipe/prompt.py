"""The prompt phase of one layer: attend exactly, observe, score, select, and store what stays.

Each layer is compressed as soon as it has attended, so that the peak is the compressed cache plus
one full layer. A prompt chunk or chat turn on top of stored tokens takes the same path.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.formulas import sinks
from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.sums import Observation, over_group
from kvpress.pipe.layer_budgets import plan
from kvpress.pipe.pools import compete
from kvpress.pipe.stages.absorb import compact
from kvpress.pipe.stages.observe import attend_and_sum, prompt_sums
from kvpress.pipe.stages.select import finite, score, select
from kvpress.pipe.stages.sparsify import choose
from kvpress.pipe.state.channels import turned_query, turns
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import calibrated, first_query, gram, step
from kvpress.pipe.state.together import evicting, evicts_together, of_all, selecting
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.pooling import thins
from kvpress.policy.slots import Queries, Slots
from kvpress.store import Survivors
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY

_MOST_EVICTED = 256  # slots of a row that leave one by one; more are cheaper to copy


class _Chunk(NamedTuple):
    """New tokens of some sequences, and all slots that they see."""

    group: list[int]
    tokens: Tokens
    columns: dict[str, Tensor]  # dense, in order of positions, the new tokens last
    request: Observation | None  # what the policy wants to observe


def run_prompt(
    layer: Layer, group: list[int], tokens: Tokens, before_b: Tensor
) -> tuple[Tensor, Survivors]:
    """Attention output `[b, N, Q, D]` of a prompt chunk, and the slots that stay."""
    layer.sequences.decoded.tokens_B[group] = 0
    layer.prompted_at = layer.columns_seen
    layer.evicted_in_prompt = layer.evicted_in_prompt - set(group)  # a new one: forks share it
    if _passes_by(layer, group, tokens):
        return _attend_passing(layer, group, tokens)
    columns = candidates(layer, group, tokens, before_b)
    where = step(layer, group[0], tokens.query_bNQD.shape[2])
    request = None if layer.recipe.probes else layer.recipe.stage("observe").observe(where)
    chunk = _Chunk(group, tokens, columns, request)
    with layer.timed("prefill attention"):
        out_bNQD, sums_BNS = _attention_and_sums(layer, tokens, columns, chunk.request)
    with torch.no_grad():
        return out_bNQD, _compress(layer, chunk, sums_BNS)


def _passes_by(layer: Layer, group: list[int], tokens: Tokens) -> bool:
    """Whether what is stored is attended to where it is, part by part: nothing else asks for it."""
    rows, recipe = layer.rows, layer.recipe
    if not rows.streams or not bool((rows.counts_BH[group] > 0).any()):
        return False
    asks = layer.limits is not None or recipe.accumulates or recipe.sparsity is not None
    return not asks and not (torch.is_grad_enabled() and tokens.query_bNQD.requires_grad)


@torch.no_grad()
def _attend_passing(layer: Layer, group: list[int], tokens: Tokens) -> tuple[Tensor, Survivors]:
    """The attention output of a chunk over slots that stay in their tiers, and that all stay."""
    rows = layer.rows
    with layer.timed("prefill attention"):
        own = (tokens.key_bHQD, tokens.value_bHQD)
        out, lse_bNQ = rows.attend_prompt(tokens.query_bNQD, own, group, tokens.logits)
        out_bNQD, _ = sinks.taken((out, lse_bNQ, None), tokens.sink_N)
    counts_bH = rows.counts_BH[group] + tokens.key_bHQD.shape[2]
    return out_bNQD, Survivors(tuple(group), {}, counts_bH)


def _attention_and_sums(
    layer: Layer, tokens: Tokens, columns: dict[str, Tensor], request: Observation | None
) -> tuple[Tensor, Tensor | None]:
    """The attention output, and the sums that a policy asked for, where they come with it."""
    query, scaling, softcap = tokens.query_bNQD, tokens.scaling, tokens.softcap
    key, value, position = columns[KEY], columns[VALUE], columns[POSITION]
    fresh = key is tokens.key_bHQD  # nothing was stored before
    trains = torch.is_grad_enabled() and query.requires_grad
    map_bNX = choose(layer, tokens, key, position, trains)
    index, first = layer.kind.index, first_query(layer, tokens)
    if request is not None and request.window is None and not trains:
        if map_bNX is not None:
            layer.context.ledger.note("Attention sums of prompts are of the blocks computed.")
        if fresh and request.kind == "sum" and tokens.sink_N is None:
            return attend_and_sum(
                query, key, value, position, index, request, scaling, softcap, map_bNX, first
            )
        if map_bNX is not None:
            out_bNQD, _ = ops.attend_blocks(query, key, value, map_bNX, scaling)
            return out_bNQD, prompt_sums(
                query, key, position, index, request, scaling, softcap, map_bNX, first=first
            )
    if map_bNX is not None:
        return ops.attend_blocks(query, key, value, map_bNX, scaling)[0], None
    seen = None if fresh else position
    rest = (scaling, softcap, layer.kind.window, tokens.sink_N)
    return prompt_attention(query, key, value, seen, *rest), None


@torch.no_grad()
def store_prompt(
    layer: Layer, survivors: list[Survivors], chunks: list[tuple[Tokens, Tensor]]
) -> None:
    """Stores what stays: in new pages, or in place where little changed and pages are shared."""
    if not survivors:
        return
    new = sum(x.nbytes for tokens, _ in chunks for x in (tokens.key_bHQD, tokens.value_bHQD))
    layer.note_peak(new)
    _store(layer, survivors, chunks)
    layer.context.note_peak(
        new
    )  # layers before this one are compressed, those behind it are not yet


def _store(layer: Layer, survivors: list[Survivors], chunks: list[tuple[Tokens, Tensor]]) -> None:
    with layer.timed("store"):
        evicted = any(kept.evicted for kept in survivors)
        if evicted:
            layer.evicted_at = layer.columns_seen
        changed = evicted or layer.recipe.gathers_prompts
        if not bool(layer.rows.counts.any()) or (
            changed and not _in_place(layer, survivors, chunks)
        ):
            layer.refill(survivors)
            return
        for kept, (tokens, before_b) in zip(survivors, chunks, strict=True):
            layer.append(tokens, kept.sequences, before_b)
            if changed:
                layer.rows.retain(kept)
        layer.excess.forget()


def _in_place(
    layer: Layer, survivors: list[Survivors], chunks: list[tuple[Tokens, Tensor]]
) -> bool:
    """Whether pages are shared and rows lose so few slots that they can stay so."""
    if layer.stores.packs:  # what is old stays where it is
        return True
    if not layer.rows.memory.shares or layer.recipe.merging is not None:
        return False  # where slots are merged, kept ones change too
    stored_BH = layer.rows.counts_BH
    for kept, (tokens, _) in zip(survivors, chunks, strict=True):
        lost_bH = stored_BH[list(kept.sequences)] + tokens.key_bHQD.shape[2] - kept.counts_BH
        if int(lost_bH.max()) > _MOST_EVICTED:
            return False
    return True


def candidates(
    layer: Layer, group: list[int], tokens: Tokens, before_b: Tensor
) -> dict[str, Tensor]:
    """What is stored of some sequences, in position order, followed by their new tokens: dense."""
    batch, heads, new = tokens.key_bHQD.shape[:3]
    device = tokens.key_bHQD.device
    position_bQ = host.arange(new) + before_b[:, None]
    position_bHQ = position_bQ.to(device)[:, None].expand(batch, heads, new)
    columns = {KEY: tokens.key_bHQD, VALUE: tokens.value_bHQD, POSITION: position_bHQ}
    if layer.recipe.accumulates:
        columns[MASS] = torch.zeros(batch, heads, new, device=device, dtype=torch.float32)
    if not bool((layer.rows.counts_BH[group] > 0).any()):
        return columns
    old = layer.rows.dense_by_position(group)
    return {name: torch.cat([old[name].to(x.dtype), x], dim=2) for name, x in columns.items()}


def _compress(layer: Layer, chunk: _Chunk, sums_BNS: Tensor | None) -> Survivors:
    """The slots of some sequences that stay, after observation and selection."""
    group, columns = chunk.group, chunk.columns
    with layer.timed("observe"):
        slots = _observe(layer, chunk, sums_BNS)
        if slots.mass_BHS is not None:
            columns[MASS] = slots.mass_BHS
        if layer.recipe.shares:
            plan(layer, group, slots)
    with layer.timed("select"):
        stored_BHS = slots.position_BHS != EMPTY
        stored_BH = stored_BHS.sum(-1).cpu()
        kept_BHS, counts_BH = stored_BHS, stored_BH
        if layer.recipe.defers:
            _score_for_later(layer, group, slots)
        elif thins(layer.recipe.pool) or selecting(layer, _is_over(layer, group, stored_BH)):
            kept_BHS, counts_BH = _select(layer, group, slots, stored_BH)
    if evicting(layer, bool((counts_BH < stored_BHS.shape[-1]).any())):
        columns = compact(layer, group, slots, kept_BHS, counts_BH)
    return Survivors(tuple(group), columns, counts_BH, bool((counts_BH < stored_BH).any()))


def _select(
    layer: Layer, group: list[int], slots: Slots, stored_BH: Tensor
) -> tuple[Tensor, Tensor]:
    """True for the slots that stay, and how many do (host); rows may compete for them first."""
    score_BHS = finite(layer, slots, group, score(layer, slots))
    if layer.recipe.pool is not None:
        compete([layer], [slots], [score_BHS], group)
    kept_BHS, counts_BH = select(layer, slots, score_BHS, group, stored_BH)
    lost_b = (counts_BH < stored_BH).any(1, keepdim=True)
    if evicts_together(layer):
        lost_b = of_all(layer, lost_b).any(1)
    lost = {b for b, some in zip(group, lost_b.flatten().tolist(), strict=True) if some}
    layer.evicted_in_prompt = layer.evicted_in_prompt | lost
    return kept_BHS, counts_BH


def _is_over(layer: Layer, group: list[int], stored_BH: Tensor) -> bool:
    return bool((stored_BH > layer.sequences.quota_BH[group]).any())


def _score_for_later(layer: Layer, group: list[int], slots: Slots) -> None:
    """Keeps the scores of slots until all layers have theirs, where what is stored gives none."""
    if layer.recipe.stage("score").overrides("score") and not layer.recipe.probes:
        given = (group, slots.position_BHS, score(layer, slots))
        layer.context.pending.setdefault(layer.kind.index, []).append(given)


def _observe(layer: Layer, chunk: _Chunk, sums_BNS: Tensor | None) -> Slots:
    """The slots of some sequences with what the policy asked to observe and to accumulate.

    sums_BNS: what was observed already, with the attention.
    """
    tokens, columns, request = chunk.tokens, chunk.columns, chunk.request
    if request is not None and sums_BNS is None:
        sums_BNS = prompt_sums(
            tokens.query_bNQD,
            columns[KEY],
            columns[POSITION],
            layer.kind.index,
            request,
            tokens.scaling,
            tokens.softcap,
            sink_N=tokens.sink_N,
            first=first_query(layer, tokens),
        )
    attention_BHS = None
    if request is not None and sums_BNS is not None:
        attention_BHS = over_group(sums_BNS, layer.kind.heads, request.kind)
    slots = Slots(
        layer=layer.kind.index,
        position_BHS=columns[POSITION],
        seen_B=layer.sequences.seen_B[chunk.group].to(tokens.key_bHQD.device),
        new_tokens=tokens.query_bNQD.shape[2],
        fetch=columns.__getitem__,
        attention_BHS=attention_BHS,
        attention_BNS=sums_BNS,
        mass_BHS=columns.get(MASS),
        key_width=layer.key_width,
        asked=_queries(layer, chunk.group, tokens),
        rotation=layer.rotation,
        turned=turns(layer.recipe),
        gram_NEF=gram(layer),
        calibrated=calibrated(layer),
        gather=partial(of_all, layer),
        first=layer.kind.first,
    )
    if layer.recipe.gathers_prompts:
        slots = _without_steps(layer, chunk.group, slots)
        mass_BHS = layer.recipe.stage("accumulate").accumulate(slots).float()
        slots = replace(slots, mass_BHS=mass_BHS)
    return slots


def _without_steps(layer: Layer, group: list[int], slots: Slots) -> Slots:
    """The slots, where masses come with prompts alone: those since the last one have none yet."""
    own = layer.sequences
    if layer.recipe.gathers or slots.mass_BHS is None:
        return slots
    known_b11 = own.looked_B[group][:, None, None].to(slots.position_BHS.device)
    own.looked_B = own.looked_B.clone()
    own.looked_B[group] = own.seen_B[group]
    return replace(slots, mass_BHS=slots.mass_BHS.where(slots.position_BHS < known_b11, 0.0))


def _queries(layer: Layer, group: list[int], tokens: Tokens) -> Queries | None:
    """The queries of a chunk, where the policy scores by them."""
    if "query" not in layer.recipe.needs:
        return None
    if bool(layer.rows.counts.any()):
        layer.context.ledger.note("Prompts in several parts: the last part's queries scored all.")
    query_bNQD = tokens.query_bNQD
    if query_bNQD.shape[2] < layer.recalled:  # those before them are kept as well
        query_bNQD = layer.sequences.recalled.last(group, layer.recalled)
    query_bNQD = turned_query(query_bNQD, layer.recipe)  # back
    return Queries(query_bNQD, tokens.scaling, tokens.softcap)
