"""Quotas after a prompt: how many slots every row of a layer may keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.formulas.apportion import apportion
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import geometry
from kvpress.policy.budget import Geometry, Limits, Quota, share
from kvpress.policy.pooling import Room, thins

FIXED = "While decoding, rows stay at"
_ENTRY = 4  # bytes of an entry in a page table


def compressed(layer: Layer) -> list[Layer]:
    """The layers of a cache that have the policy's budget."""
    return [other for other in layer.context.layers if other.kind.window is None]


def limits_of(layer: Layer, sequence: int) -> Limits:
    """The limits of a sequence: what is protected of it counts as sinks."""
    assert layer.limits is not None, "only layers with a budget have quotas"
    guarded = int(layer.sequences.guarded_B[sequence])
    if guarded == layer.limits.sink:
        return layer.limits
    return replace(layer.limits, sink=guarded)


def set_quotas(
    layer: Layer, group: Sequence[int], seen_b: Tensor, portion_b: Sequence[float] | None = None
) -> None:
    """Decides how many slots rows may keep after `seen_b` tokens of a prompt.

    portion_b: what this layer gets in each sequence, in multiples of the budget; None: what the
    policy allocates. Raises BudgetError, and PolicyError for what no budget allows.
    """
    if layer.limits is None or not group:
        return
    shape, quotas = geometry(layer), []
    if layer.sequences.spans:
        layer.sequences.guard(group, seen_b)
    layer.context.ledger.withdraw(FIXED)  # of the chunk or turn before
    for i, (b, seen) in enumerate(zip(group, seen_b.tolist(), strict=True)):
        limits = limits_of(layer, b)
        quota = limits.quota(seen, shape, 1.0 if portion_b is None else portion_b[i])
        quotas.append([quota] * layer.kind.heads)
        if portion_b is None:  # layers with budgets of their own are explained together
            _explain(layer, seen, quota)
    write(layer, group, quotas)
    if layer.recipe.allocates and layer.kind.window is None:
        plan_rows(layer, group, seen_b)


def write(layer: Layer, group: Sequence[int], quotas: Sequence[Sequence[Quota]]) -> None:
    """Gives the rows of some sequences these quotas."""
    own, rows = layer.sequences, list(group)
    own.quota_R, own.recent_R = own.quota_R.clone(), own.recent_R.clone()  # may be shared
    own.quota_BH[rows] = host.tensor([[quota.slots for quota in of] for of in quotas])
    own.recent_BH[rows] = host.tensor([[quota.recent for quota in of] for of in quotas])
    layer.excess.forget()


def portions(slots_X: Tensor) -> Tensor:
    """What rows keep in multiples of their mean, fp64 `[X]`, by which they share a budget.

    Not of the budget: that of a short text may be below the protected tokens, or rounded to little.
    """
    return slots_X / slots_X.double().mean()


def set_portions(layer: Layer, group: Sequence[int], slots: Sequence[Sequence[float]]) -> None:
    """Notes what rows keep in multiples of an equal budget, by which they grow.

    slots: of rows, in such a budget of one slot.
    """
    own = layer.sequences
    own.portion_R = own.portion_R.clone()  # growths tell by the tensor
    own.portion_BH[list(group)] = host.tensor(slots, dtype=torch.float64)


def plan_rows(layer: Layer, group: Sequence[int], seen_b: Tensor, decoding: bool = False) -> None:
    """Gives the rows of a layer what the policy allocates after so many tokens.

    decoding: then the budget of an equal row is not rounded down before it is divided: rows that
    keep everything would lose a token each time.
    """
    assert layer.limits is not None, "only layers with a budget have quotas"
    own, quotas, portions = layer.sequences, [], []
    for b, seen in zip(group, seen_b.tolist(), strict=True):
        limits = limits_of(layer, b)
        quota = limits.quota(seen, geometry(layer))
        slots, portion = _plan(layer, limits, quota, seen, decoding)
        quotas.append([limits.row(n) for n in slots])
        portions.append(portion)
    write(layer, group, quotas)
    set_portions(layer, group, portions)
    own.planned_B = own.planned_B.clone()
    own.planned_B[list(group)] = seen_b


def _plan(
    layer: Layer, limits: Limits, quota: Quota, seen: int, decoding: bool
) -> tuple[list[int], list[float]]:
    """The slots of the rows of a layer after a text, and what they get of a budget that grows."""
    layers, plans, key = compressed(layer), layer.context.plans, (seen, quota, limits, decoding)
    if key not in plans:
        if len(plans) > 64:
            plans.clear()  # of prompts that are gone
        sizes = [other.kind.of_all for other in layers]
        asked_X = _asked(layer, layers, limits, quota, seen)
        # Equal while there is room for everything, or for no more than protected tokens.
        slots_X = torch.full_like(asked_X, quota.slots).long()
        if quota.slots < seen and not quota.floored:
            whole_X = asked_X * (limits.even(seen) / quota.slots) if decoding else asked_X
            slots_X = fit(whole_X, limits, seen, geometry(layer), sizes)
        parts = (torch.split(x, sizes) for x in (slots_X, portions(slots_X)))
        for other, n, x in zip(layers, *parts, strict=True):
            own = other.kind.own
            plans.setdefault(key, []).append((own(n).tolist(), own(x).tolist()))
    slots, portion = plans[key][layers.index(layer)]
    return slots, portion


def fit(
    asked_X: Tensor, limits: Limits, seen: int, shape: Geometry, sizes: Sequence[int]
) -> Tensor:
    """Slots of rows: what was asked for, as far as there are tokens, and not less than is needed.

    The sum is that of the budget, if so much was asked for, in whole pages where it is in bytes.
    What a row cannot use goes to the others in proportion. sizes: rows of every layer.
    """
    unit, more = (1, 0) if limits.budget.unit != "bytes" else (shape.page_slots, shape.headroom)
    low = max(1, limits.least)
    # Pages of a row are taken whole: its slots, and those that stay free for what comes next.
    total = (math.floor(float(asked_X.sum()) + 1e-6) + more * len(asked_X)) // unit
    bounds = [torch.full_like(asked_X, -(-(n + more) // unit)) for n in (low, max(seen, low))]
    pages_X = apportion(asked_X + more, total, *bounds)
    if limits.budget.unit == "bytes":  # the table of a layer is as wide as its longest row
        layers = torch.split(pages_X, list(sizes))
        empty = sum(int((x.max() - x).sum()) for x in layers)
        total -= -(-_ENTRY * empty // shape.page_bytes)
        pages_X = apportion(asked_X + more, total, *bounds)
    return pages_X * unit - more


def _asked(
    layer: Layer, layers: Sequence[Layer], limits: Limits, quota: Quota, seen: int
) -> Tensor:
    """What the policy allocates to all rows: fp64 `[X]`. Raises PolicyError."""
    policy, heads = layer.recipe.stage("allocate"), tuple(other.kind.of_all for other in layers)
    room = Room(quota.slots, seen, limits.least, heads, layer.context.calibrated_for(policy))
    given = policy.allocate(room)
    lists = given.tolist() if isinstance(given, Tensor) else [list(x) for x in given]
    asked_X = host.tensor([float(n) for x in lists for n in x], dtype=torch.float64)
    if tuple(len(x) for x in lists) != heads or not bool((asked_X > 0).all()):
        raise PolicyError(
            f"{policy} allocates {lists}; it must give a number above 0 for every KV head of"
            f" {len(heads)} layers, which have {list(heads)} of them."
        )
    allowed = quota.slots * len(asked_X)
    if float(asked_X.sum()) > allowed * (1 + 1e-6):
        raise PolicyError(
            f"{policy} allocates {float(asked_X.sum()):.0f} slots to the KV heads of {len(heads)}"
            f" layers, but the budget of {quota.slots} a row allows {allowed}. What a head or a"
            " layer gets more another one must get less."
        )
    return asked_X


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
    elif thins(layer.recipe.pool):
        return  # what stays is known once there are scores
    elif seen <= quota.slots:
        ledger.note(
            f"A prompt of {seen} tokens is within its budget {budget}: nothing was evicted."
        )
    elif budget.relative and share(budget.amount, seen) < quota.slots:
        ledger.note(f"The budget {budget} of {seen} tokens is less than one: 1 was kept instead.")
    if budget.unit == "prompt" and layer.limits.interval:
        ledger.note(f"{FIXED} {quota.slots} slots: {budget} of a prompt of {seen} tokens.")
