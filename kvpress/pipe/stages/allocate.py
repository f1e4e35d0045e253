"""Quotas: how many slots every row of a layer may keep, after a prompt and while decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.host import lasting
from kvpress.pipe.state.growth import Growth
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import geometry
from kvpress.policy.budget import UNLIMITED, Quota, share

_FIXED = "While decoding, rows stay at"


def set_quotas(
    layer: Layer, group: Sequence[int], seen_b: Tensor, portion_b: Sequence[float] | None = None
) -> None:
    """Decides how many slots rows may keep after `seen_b` tokens of a prompt. Raises BudgetError.

    portion_b: what this layer gets in each sequence, in multiples of the budget; None: 1.
    """
    if layer.limits is None or not group:
        return
    portions = [1.0] * len(group) if portion_b is None else portion_b
    shape, rows = geometry(layer), list(group)
    sizes = zip(seen_b.tolist(), portions, strict=True)
    quotas = [layer.limits.quota(seen, shape, portion) for seen, portion in sizes]
    slots = [_allocate(layer, quota) for quota in quotas]
    own = layer.sequences
    own.quota_R, own.recent_R = own.quota_R.clone(), own.recent_R.clone()  # may be shared
    own.recent_BH[rows] = host.tensor([[quota.recent] for quota in quotas])
    own.quota_BH[rows] = host.tensor(slots)
    layer.excess.growth = None
    layer.excess.forget()
    layer.context.ledger.withdraw(_FIXED)  # of the chunk or turn before
    if portion_b is not None:
        return  # layers with budgets of their own are explained together
    for seen, quota in zip(seen_b.tolist(), quotas, strict=True):
        _explain(layer, seen, quota)


def grow(layer: Layer) -> None:
    """Brings quotas that grow up to the tokens seen, before what is decoded is evicted."""
    growth = layer.excess.growth or _growth(layer)
    if growth.seen_B is not layer.sequences.seen_B:
        _advance(growth, layer)
    if growth.version != layer.excess.grown:
        layer.excess.quotas_grew(growth)
        layer.sequences.quota_R, layer.sequences.recent_R = growth.quota_R, growth.recent_R


def _growth(layer: Layer) -> Growth:
    """The growth that this layer shares with those whose quotas are the same."""
    known, portions = layer.context.growths, tuple(layer.sequences.portion_B.tolist())
    own = layer.kind.index if layer.recipe.stage("allocate").overrides("allocate") else None
    if len(known) > 2 * layer.context.compressed:
        known.clear()  # of prompts and orders of sequences that are gone
    key = (layer.kind.heads, own, portions)
    if key not in known:
        known[key] = Growth(portions, geometry(layer))
    layer.excess.growth, layer.excess.grown = known[key], -1
    return known[key]


@lasting
def _advance(growth: Growth, layer: Layer) -> None:
    """Makes the quotas after the tokens that the layer has seen."""
    newest, before_B, seen_B = layer.context.newest, growth.seen_B, layer.sequences.seen_B
    growth.seen_B = seen_B
    if newest is not None and newest[0] is before_B and newest[1] is seen_B:  # one token more
        growth.lasts -= 1
        if growth.lasts > 0:
            return
    elif before_B is not None and torch.equal(before_B, seen_B):
        return  # layers may count in tensors of their own
    changes = _renew(growth, layer, seen_B.tolist())
    if changes:
        growth.version += 1
        growth.least, growth.most = min(changes), max(changes)
        growth.quota_R = host.tensor([slots for own in growth.slots for slots in own])
        recents = [quota.recent for quota in growth.quotas for _ in range(layer.kind.heads)]
        growth.recent_R = host.tensor(recents)


def _renew(growth: Growth, layer: Layer, seen_b: list[int]) -> list[int]:
    """Makes the quotas that hold no more: by how much those of rows changed. Empty: all hold."""
    assert layer.limits is not None, "only layers with a budget have quotas"
    if not growth.quotas:
        growth.span_b = [range(0)] * len(seen_b)
        growth.quotas = [Quota(0, 0, 0, False)] * len(seen_b)
        growth.slots = [[0] * layer.kind.heads] * len(seen_b)
    changes: list[int] = []
    old = [b for b, seen in enumerate(seen_b) if seen not in growth.span_b[b]]
    for b in old:
        seen, portion = seen_b[b], growth.portion_b[b]
        growth.quotas[b] = layer.limits.quota(seen, growth.shape, portion)
        slots = _allocate(layer, growth.quotas[b])
        changes += [new - before for new, before in zip(slots, growth.slots[b], strict=True)]
        growth.slots[b] = slots
        growth.span_b[b] = range(seen, seen + layer.limits.budget.lasts(seen, portion))
    growth.lasts = min(span.stop - seen for span, seen in zip(growth.span_b, seen_b, strict=True))
    return changes + [0] * (len(old) < len(seen_b)) if old else []


def _allocate(layer: Layer, quota: Quota) -> list[int]:
    """Slots of every KV head.

    Raises PolicyError if a policy allocates less than it protects, or more than the budget.
    """
    slots, policy = _asked(layer, quota), layer.recipe.stage("allocate")
    if policy.overrides("allocate"):
        together = [layer] if layer.recipe.shares else compressed(layer)
        if layer is together[0]:  # which speaks for all of them, before anything changes
            _check_sum(together, quota)
    return slots


def _asked(layer: Layer, quota: Quota) -> list[int]:
    heads, least = layer.kind.heads, max(1, quota.sink + quota.recent)
    policy, place = layer.recipe.stage("allocate"), (layer.kind.index, layer.context.compressed)
    slots = [min(int(n), UNLIMITED) for n in policy.allocate(quota.slots, *place, heads)]
    if len(slots) != heads or min(slots) < min(least, quota.slots):
        raise PolicyError(
            f"{policy} allocates {slots} slots in layer {layer.kind.index}; it must give {heads}"
            f" numbers of at least {min(least, quota.slots)}, the protected tokens."
        )
    return slots


def _check_sum(layers: Sequence[Layer], quota: Quota) -> None:
    """Raises PolicyError where layers that share a budget are given more than that."""
    given = [sum(_asked(layer, quota)) for layer in layers]
    allowed = quota.slots * sum(layer.kind.heads for layer in layers)
    if sum(given) > allowed and quota.slots < UNLIMITED:
        raise PolicyError(
            f"{layers[0].recipe.stage('allocate')} allocates {sum(given)} slots to the KV heads of"
            f" {len(layers)} layers ({given}), but the budget of {quota.slots} a row allows"
            f" {allowed}. What a head or a layer gets more another one must get less."
        )


def compressed(layer: Layer) -> list[Layer]:
    """The layers of a cache that have the policy's budget."""
    return [other for other in layer.context.layers if other.kind.window is None]


def _explain(layer: Layer, seen: int, quota: Quota) -> None:
    """Notes for the report where a budget keeps other counts than its fraction promises."""
    if layer.kind.window is not None or layer.limits is None:
        return
    budget, ledger = layer.limits.budget, layer.context.ledger
    if quota.floored:
        ledger.note(
            f"The budget {budget} of {seen} tokens is below the protected tokens (sink"
            f" {quota.sink}, recent {quota.recent}): {min(seen, quota.slots)} tokens were kept"
            " instead."
        )
    elif seen <= quota.slots:
        ledger.note(
            f"A prompt of {seen} tokens is within its budget {budget}: nothing was evicted."
        )
    elif budget.relative and share(budget.amount, seen) < quota.slots:
        ledger.note(f"The budget {budget} of {seen} tokens is less than one: 1 was kept instead.")
    if budget.unit == "prompt" and layer.limits.interval:
        ledger.note(f"{_FIXED} {quota.slots} slots: {budget} of a prompt of {seen} tokens.")
