"""Which slots of a layer stay: the policy's choice within its quotas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.formulas.ranking import protect
from kvpress.pipe.state.layer import Layer
from kvpress.policy.recipe import adds_attention
from kvpress.policy.slots import Slots
from kvpress.types import EMPTY


def protected(layer: Layer, slots: Slots, group: Sequence[int]) -> Tensor:
    """True for the slots of some sequences that no policy may drop."""
    assert layer.limits is not None, "only layers with a budget select"
    own, rows, device = layer.sequences, list(group), slots.position_BHS.device
    recent_bH = own.recent_BH[rows].to(device)
    guarded_bHS = protect(slots.position_BHS, slots.seen_B, own.sink_B[rows], recent_bH)
    return guarded_bHS | own.spans.hold(slots.position_BHS, rows) if own.spans else guarded_bHS


def score(layer: Layer, slots: Slots) -> Tensor:
    """The policy's scores. Raises PolicyError if they are not one number per slot."""
    score_BHS = layer.recipe.stage("score").score(slots)
    if score_BHS.shape != slots.position_BHS.shape:
        raise PolicyError(
            f"{layer.recipe} gave scores of shape {tuple(score_BHS.shape)} for slots of shape "
            f"{tuple(slots.position_BHS.shape)}; the score stage returns one number per slot."
        )
    return score_BHS


def finite(layer: Layer, slots: Slots, group: Sequence[int], score_BHS: Tensor) -> Tensor:
    """The scores; those that are no numbers rank last.

    Raises PolicyError if the policy made them of what is finite.
    """
    if not bool(score_BHS.isnan().any()):
        return score_BHS
    _check_numbers(layer, slots, group, score_BHS)
    return score_BHS.masked_fill(score_BHS.isnan(), -torch.inf)


def select(
    layer: Layer, slots: Slots, score_BHS: Tensor, group: Sequence[int], stored_BH: Tensor
) -> tuple[Tensor, Tensor]:
    """True for the slots of some sequences that stay, and how many stay of each row (host).

    Raises PolicyError if the policy misses the quota.
    """
    quota_BH = layer.sequences.quota_BH[list(group)]
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


def _check_numbers(layer: Layer, slots: Slots, group: Sequence[int], score_BHS: Tensor) -> None:
    """Notes the rows whose scores are no numbers because what the model computed is none either.

    Their slots without a score rank last, as they do while decoding. Raises PolicyError where keys,
    values and attention are finite: then the policy made them.
    """
    found_BH = (score_BHS.isnan() & (slots.position_BHS != EMPTY)).any(-1)
    given = [slots.key_BHSD, slots.value_BHSD, slots.attention_BHS]
    if adds_attention(layer.recipe):
        given.append(slots.mass_BHS)  # of steps before; otherwise the policy makes it
    finite_B = torch.stack([x.isfinite().flatten(1).all(1) for x in given if x is not None]).all(0)
    for b, found_H, finite in zip(group, found_BH.tolist(), finite_B.tolist(), strict=True):
        heads = [layer.kind.first + head for head, found in enumerate(found_H) if found]
        where = f"layer {layer.kind.index}, KV heads {heads}"
        if heads and finite:
            raise PolicyError(
                f"{layer.recipe} gave NaN scores for sequence {b} in {where}, from keys, values and"
                " attention that are finite; scores must be numbers."
            )
        known = any(note.startswith(f"Sequence {b} is ") for note in layer.context.ledger.notes)
        if heads and not known:
            layer.context.ledger.note(
                f"Sequence {b} is not finite in {where}: the model computed NaN or infinite keys,"
                " values or attention. Tokens without a score were evicted first; the other"
                " sequences are not touched."
            )
