"""Quotas that grow while tokens are decoded: the first layer of a step makes those of all."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress import host
from kvpress.host import lasting
from kvpress.pipe.stages.allocate import compressed, plan_rows
from kvpress.pipe.state.growth import Change, Growth
from kvpress.pipe.state.layer import Layer
from kvpress.policy.budget import UNLIMITED

_EPS = 1e-9  # a part of a whole number of tokens is one, whatever its last bits are
_LONGER = 17 / 16  # times as many tokens as when rows got budgets of their own: they get new ones


def grow(layer: Layer) -> None:
    """Brings quotas that grow up to the tokens seen, before what is decoded is evicted."""
    growth, own, index = layer.context.growth, layer.sequences, layer.kind.index
    if growth is None or not growth.holds(index, own.portion_R, own.guarded_B):
        growth = layer.context.growth = _growth(layer)
    if growth.seen_B is not own.seen_B:
        growth = _advance(growth, layer)
    change = growth.changes[index]
    if layer.excess.change is not change or layer.excess.grown != change.version:
        layer.excess.quotas_grew(change)
        own.quota_R, own.recent_R = change.quota_R, change.recent_R


@lasting
def _growth(layer: Layer) -> Growth:
    """That of all layers, as they are now."""
    layers = compressed(layer)
    rows = [other.sequences for other in layers]
    sequence_X = [host.arange(len(own)).repeat_interleave(own.heads) for own in rows]
    guarded_X = torch.cat([own.guarded_B[b_R] for own, b_R in zip(rows, sequence_X, strict=True)])
    made = Growth(torch.cat([own.portion_R for own in rows]), guarded_X, torch.cat(sequence_X))
    for other, own in zip(layers, rows, strict=True):
        made.sources[other.kind.index] = (own.portion_R, own.guarded_B)
        made.changes[other.kind.index] = Change(own.quota_R, own.recent_R)
    return made


@lasting
def _advance(growth: Growth, layer: Layer) -> Growth:
    """The growth after the tokens that the layer has seen."""
    newest, before_B, seen_B = layer.context.newest, growth.seen_B, layer.sequences.seen_B
    growth.seen_B = seen_B
    if newest is not None and newest[0] is before_B and newest[1] is seen_B:  # one token more
        growth.lasts -= 1
        if growth.lasts > 0:
            return growth
    elif before_B is not None and torch.equal(before_B, seen_B):
        return growth  # layers may count in tensors of their own
    if layer.recipe.allocates:
        growth = _planned(growth, layer, seen_B)
    _renew(growth, layer, seen_B)
    if layer.recipe.allocates:  # whatever the rest of a batch does, each gets new ones in its time
        steps = int((_due(layer) - seen_B).min())
        growth.lasts = max(1, min(growth.lasts, steps))
    return growth


def _planned(growth: Growth, layer: Layer, seen_B: Tensor) -> Growth:
    """The growth by what the policy allocates now, where the text became much longer.

    What protected tokens take from the budget of a row matters less then, and where the budget is
    in tokens there may no longer be room for everything.
    """
    group = (seen_B >= _due(layer)).nonzero().flatten().tolist()
    if not group:
        return growth
    for other in compressed(layer):
        plan_rows(other, group, seen_B[group], decoding=True)
    made = layer.context.growth = _growth(layer)
    made.seen_B = seen_B
    return made


def _due(layer: Layer) -> Tensor:
    """The tokens with which sequences get new budgets of rows: int64 `[B]`."""
    limits, planned_B = layer.limits, layer.sequences.planned_B
    assert limits is not None, "only layers with a budget have quotas"
    due_B = (planned_B.double() * _LONGER + 4).ceil().long()
    if limits.budget.unit != "tokens":
        return due_B
    tokens = int(limits.budget.amount)
    return due_B.where(planned_B > tokens, tokens + 1)


def _renew(growth: Growth, layer: Layer, seen_B: Tensor) -> None:
    """Makes the quotas of all rows anew, and says which layers have others than before."""
    limits = layer.limits
    assert limits is not None, "only layers with a budget have quotas"
    seen_X = seen_B[growth.sequence_X].double()
    part_X = growth.portion_X * float(limits.budget.amount)
    if not limits.budget.relative:
        slots_X, growth.lasts = (part_X + _EPS).floor().clamp(1, UNLIMITED), 1
    else:
        slots_X = (part_X * seen_X + _EPS).floor().clamp(1, UNLIMITED)
        next_X = (slots_X + 1 - _EPS) / part_X - seen_X  # steps until a row gets a slot
        growth.lasts = int(next_X.masked_fill(part_X.isinf(), 2**31).ceil().min().clamp_min(1))
    if limits.recent is None:
        of_X = slots_X.where(part_X.isfinite(), seen_X)  # a row may keep everything
        recent_X = (of_X * limits.recent_ratio + _EPS).floor().long()
    else:
        recent_X = torch.full_like(growth.guarded_X, limits.recent)
    growth.take(slots_X.long().maximum(growth.guarded_X + recent_X), recent_X)
