"""Which slots of a layer stay: the policy's choice within its quotas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.layer import Layer
from kvpress.select import protect
from kvpress.types import Slots


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
