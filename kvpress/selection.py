"""Which slots of a layer stay: its quotas after a prompt, and the policy's choice within them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.budget import Geometry, Quota
from kvpress.errors import PolicyError
from kvpress.layer import Layer
from kvpress.select import protect
from kvpress.types import Slots


def geometry(layer: Layer) -> Geometry:
    """What a budget in bytes must know of a layer."""
    return Geometry(
        layers=layer.run.layers,
        heads=layer.kind.heads,
        page_slots=layer.rows.page_slots,
        page_bytes=layer.rows.page_bytes(),
        row_bytes=layer.rows.row_bytes(),
        headroom=layer.headroom,
    )


def set_quotas(
    layer: Layer, group: Sequence[int], seen_b: Tensor, portion_b: Sequence[float] | None = None
) -> None:
    """Decides how many slots rows may keep after `seen_b` tokens. Raises BudgetError.

    portion_b: what this layer gets in each sequence, in multiples of the budget; None: 1.
    """
    if layer.limits is None or not group:
        return
    portions = [1.0] * len(group) if portion_b is None else portion_b
    sizes = zip(seen_b.tolist(), portions, strict=True)
    quotas = [layer.limits.quota(seen, geometry(layer), portion) for seen, portion in sizes]
    slots = [_allocate(layer, quota) for quota in quotas]
    layer.recent_B[group] = torch.tensor([quota.recent for quota in quotas])
    layer.quota_BH[group] = torch.tensor(slots)
    layer.rows_changed()
    if portion_b is not None:
        return  # layers with budgets of their own are explained together
    for seen, quota in zip(seen_b.tolist(), quotas, strict=True):
        _explain(layer, seen, quota)


def _allocate(layer: Layer, quota: Quota) -> list[int]:
    """Slots of every KV head.

    Raises PolicyError if a policy allocates less than it protects.
    """
    heads, least = layer.kind.heads, max(1, quota.sink + quota.recent)
    policy = layer.recipe.stage("allocate")
    slots = [
        int(n) for n in policy.allocate(quota.slots, layer.kind.index, layer.run.layers, heads)
    ]
    if len(slots) != heads or min(slots) < min(least, quota.slots):
        raise PolicyError(
            f"{policy} allocates {slots} slots in layer {layer.kind.index}; it must give {heads}"
            f" numbers of at least {min(least, quota.slots)}, the protected tokens."
        )
    return slots


def _explain(layer: Layer, seen: int, quota: Quota) -> None:
    """Notes for the report where a budget evicts less than its fraction promises."""
    if layer.kind.window is not None:
        return
    budget = f"budget {layer.limits.budget if layer.limits else ''}"
    if quota.floored:
        line = (
            f"The {budget} of {seen} tokens is below the protected tokens (sink {quota.sink},"
            f" recent {quota.recent}): {min(seen, quota.slots)} tokens were kept instead."
        )
        layer.run.notes[line] = None
    elif seen <= quota.slots:
        layer.run.notes[
            f"A prompt of {seen} tokens is within its {budget}: nothing was evicted."
        ] = None


def protected(layer: Layer, slots: Slots, group: Sequence[int]) -> Tensor:
    """True for the slots of some sequences that no policy may drop."""
    assert layer.limits is not None, "only layers with a budget select"
    recent_b = layer.recent_B[list(group)].to(slots.position_BHS.device)
    return protect(slots.position_BHS, slots.seen_B, layer.limits.sink, recent_b)


def score(layer: Layer, slots: Slots) -> Tensor:
    """The policy's scores. Raises PolicyError if they are not one number per slot."""
    score_BHS = layer.recipe.stage("score").score(slots)
    if score_BHS.shape != slots.position_BHS.shape:
        raise PolicyError(
            f"{layer.recipe} gave scores of shape {tuple(score_BHS.shape)} for slots of shape "
            f"{tuple(slots.position_BHS.shape)}; the score stage returns one number per slot."
        )
    return score_BHS


def select(
    layer: Layer, slots: Slots, group: Sequence[int], stored_BH: Tensor
) -> tuple[Tensor, Tensor]:
    """True for the slots of some sequences that stay, and how many stay of each row (host).

    Raises PolicyError if the policy gives scores that are not numbers, or misses the quota.
    """
    score_BHS = score(layer, slots)
    if bool(score_BHS.isnan().any()):
        raise PolicyError(
            f"{layer.recipe} gave NaN scores in layer {layer.kind.index}; scores must be numbers."
        )
    quota_BH = layer.quota_BH[list(group)]
    keep_BH = quota_BH.to(slots.position_BHS.device)
    policy = layer.recipe.stage("select")
    kept_BHS = policy.select(slots, score_BHS, protected(layer, slots, group), keep_BH)
    counts_BH = kept_BHS.sum(-1).cpu()  # the one synchronisation after a prompt
    wanted_BH = torch.minimum(stored_BH, quota_BH)
    if not torch.equal(counts_BH, wanted_BH):
        raise PolicyError(
            f"{layer.recipe} kept {counts_BH.tolist()} slots in layer {layer.kind.index}, but the"
            f" budget asks for exactly {wanted_BH.tolist()}. The select stage must return that"
            " many per row."
        )
    return kept_BHS, counts_BH
