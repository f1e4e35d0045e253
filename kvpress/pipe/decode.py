"""The decode step of one layer: append, attend over the pages, observe, evict what is over.

Where what a policy adds up and ranks by is declared, the whole step is one operator call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas import sinks
from kvpress.formulas.sums import Observation
from kvpress.host import lasting
from kvpress.ops import Columns, Noise, Old
from kvpress.ops.operands import new
from kvpress.pipe.evict import evict
from kvpress.pipe.growth import grow
from kvpress.pipe.stages import retrieve
from kvpress.pipe.stages.absorb import merge_one
from kvpress.pipe.stages.observe import observe, some
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import bounds_of, first_query, step
from kvpress.pipe.state.together import evicting, evicts_together, ranks
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.recipe import adds_attention
from kvpress.store.base import KEY, MASS, POSITION


class Fused(NamedTuple):
    """A step that is one operator call. operands: of `decode_step`; evicts: whether it evicts."""

    operands: tuple[Any, ...]
    evicts: bool


def run_decode(layer: Layer, group: list[int] | None, tokens: Tokens) -> Tensor:
    """Attention output `[b, N, 1, D]` of one new token per sequence; rows end at their quotas.

    group: the sequences, None for all of them.
    """
    if not torch.is_grad_enabled():  # as usual; entering no_grad costs as much as a tensor
        return _run(layer, group, tokens)
    with torch.no_grad():
        return _run(layer, group, tokens)


def _run(layer: Layer, group: list[int] | None, tokens: Tokens) -> Tensor:
    if group is None:
        begun = begin_step(layer, tokens)
        return run_fused(layer, begun) if isinstance(begun, Fused) else begun
    layer.count_decoded(1, group)
    due = _is_due(layer, group[0])
    if due and layer.grows:
        grow(layer)
    return _run_stages(layer, group, tokens, due)


def begin_step(layer: Layer, tokens: Tokens) -> Fused | Tensor:
    """One new token of every sequence: the operator call that is left to do, or the output."""
    layer.count_decoded(1)
    over = 0
    if _is_due(layer, 0):
        if layer.grows:
            grow(layer)
        known = layer.excess.most
        if known is None:
            known = layer.excess.measure(layer.rows.counts, layer.sequences.quota_R)
        over = _over(layer, known + 1)
    if _is_apart(layer) and over == 0 and not layer.recipe.accumulates:
        return _run_apart(layer, tokens)
    observation = _fusable(layer, over)
    if observation is None:
        return _run_stages(layer, list(range(len(layer.sequences))), tokens, over > 0)
    if tokens.sink_N is not None:
        return _run_fused_with_sinks(layer, tokens, over > 0, observation)
    return _fused(layer, tokens, over > 0, observation)


def _over(layer: Layer, over: int) -> int:
    """Slots that a row has too many at most: of all processes where evictions depend on others."""
    return ranks(layer).most(over) if evicts_together(layer) else over


def _is_apart(layer: Layer) -> bool:
    """Whether attention is no part of the one operator call: what it reads is found out first."""
    return layer.rows.streams or layer.rows.retrieving is not None


def _is_due(layer: Layer, sequence: int) -> bool:
    """Whether this step of a sequence is one that may evict."""
    interval = layer.limits.interval if layer.limits else 0
    return interval == 1 or (interval > 1 and layer.sequences.decoded.of(sequence) % interval == 0)


def _fusable(layer: Layer, over: int) -> Observation | None:
    """What to observe, if one operator call can do the whole step; otherwise None."""
    recipe = layer.recipe
    if layer.kind.sink and (layer.kind.window is None or recipe.gathers):
        return None  # the operator gives no LSE, by which sinks take their share
    if _is_apart(layer) or (recipe.gathers and not adds_attention(recipe)):
        return None
    if recipe.formats and ops.backends()[layer.rows.device.type] != "cpu":
        return None  # elsewhere a victim among old slots is found by the stages
    if over > 0 and evicts_together(layer):
        return None  # the operator merges by the rows that are here
    if over > (0 if recipe.rank is None or layer.sequences.spans else 1):
        return None  # the operator protects first and last tokens only
    if (over > 0 or recipe.accumulates) and layer.rows.memory.shares:
        return None  # the operator would write to pages of other beams or forks
    if not recipe.gathers:
        return _NOTHING
    observation = recipe.stage("observe").observe(step(layer, 0, 1))
    if observation is None or observation.weight != 1.0 or observation.kind != "sum":
        return None
    return observation


def _fused(layer: Layer, tokens: Tokens, evicts: bool, observation: Observation) -> Fused:
    """The operator call of a step. Where slots are merged it evicts none."""
    rows, recipe = layer.rows, layer.recipe
    rows.paging.reserve_one()
    pages, pools, bounds = rows.paging.operands(), rows.paging.pool.by_name, bounds_of(layer)
    columns = new(Columns, (pools[POSITION], pools[MASS] if recipe.gathers else None))
    place = layer.kind.index, first_query(layer, tokens)
    noise = new(Noise, (observation.noise, observation.tau, observation.seed, *place))
    drops = evicts and recipe.merging is None
    # Tokens are a Token, then Logits, then what the operator knows nothing of.
    operands = tokens[:3], pages, columns, bounds, drops, noise, tokens[3:5], rows.old()
    return Fused(operands, evicts)


def run_fused(layer: Layer, fused: Fused) -> Tensor:
    """The output of a step that is one operator call, and one more where it merges."""
    with layer.timed("decode attention"):
        out_BN1D = ops.decode_step(*fused.operands)
    if fused.evicts and layer.recipe.merging is not None:
        _, pages, columns, bounds, *_ = fused.operands
        with layer.timed("merge"):
            merge_one(layer, pages, columns, bounds)
    layer.count_step(fused.evicts)
    return out_BN1D


def _run_fused_with_sinks(
    layer: Layer, tokens: Tokens, evicts: bool, observation: Observation
) -> Tensor:
    """The same of a layer with sinks, whose rows are short: the LSE costs attention once more."""
    query_bN1D, key_bH1D, _ = tokens.states
    with layer.timed("decode attention"):
        _, before_bN1, _ = layer.rows.attend(query_bN1D, None, tokens.logits, False)
    stored_bH1D = key_bH1D.to(layer.rows.columns[KEY].dtype).float()
    query_bHGD = query_bN1D.float().view(len(key_bH1D), key_bH1D.shape[1], -1, key_bH1D.shape[3])
    own_bN1 = (query_bHGD * stored_bH1D).sum(-1).view_as(before_bN1) * tokens.scaling
    out_bN1D = run_fused(layer, _fused(layer, tokens, evicts, observation))
    found = (out_bN1D, torch.logaddexp(before_bN1, own_bN1), None)
    return sinks.taken(found, tokens.sink_N)[0]


def _run_apart(layer: Layer, tokens: Tokens) -> Tensor:
    """The step where attention is apart and no row is over: append, and attend to what is read.

    `decode_step` appends in one call; what it says of recent slots alone is of no use.
    """
    rows = layer.rows
    with layer.timed("store"):
        rows.paging.reserve_one()
        pages, position = rows.paging.operands(), rows.paging.pool.by_name[POSITION]
        columns, bounds = new(Columns, (position, None)), bounds_of(layer)
        ops.decode_step(tokens[:3], pages, columns, bounds, False, _SILENT, tokens[3:5], _NO_OLD)
        layer.count_step(False)
    with layer.timed("decode attention"):
        return _attend(layer, None, tokens, False)[0]


def _attend(
    layer: Layer, group: list[int] | None, tokens: Tokens, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention output of one new token of some sequences, and weights where asked for.

    Those of the layer's sinks come first, if it has any.
    """
    if layer.rows.retrieving is not None:
        return retrieve.attend(layer, group, tokens, need_weights)
    found = layer.rows.attend(tokens.query_bNQD, group, tokens.logits, need_weights)
    return sinks.taken(found, tokens.sink_N)


@lasting
def _run_stages(layer: Layer, group: list[int], tokens: Tokens, due: bool) -> Tensor:
    """The step in its parts, for policies with code of their own and for parts of a batch."""
    with layer.timed("store"):
        layer.append(tokens, group, layer.sequences.seen_B[group] - 1)
    excess_bH = layer.rows.counts_BH[group] - layer.sequences.quota_BH[group]
    evicts = due and evicting(layer, bool((excess_bH > 0).any()))
    looks = evicts or layer.recipe.gathers
    request = layer.recipe.stage("observe").observe(step(layer, group[0], 1)) if looks else None
    with layer.timed("decode attention"):
        out_bN1D, weights_bN1S = _attend(layer, some(layer, group), tokens, request is not None)
    if looks:
        with layer.timed("observe"):
            slots = observe(layer, group, weights_bN1S, request, layer.sequences.seen_B[group])
    if evicts:
        evict(layer, group, slots, excess_bH)
    return out_bN1D


_SILENT, _NO_OLD = Noise("none", 1.0, 0, 0, 0), Old([], [])
_NOTHING = Observation()  # for steps that keep no mass: the operator then observes nothing
