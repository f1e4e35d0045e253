"""What stays of a layer's rows: the kept slots, and of evicted ones what is merged into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.formulas import merging
from kvpress.formulas.merging import Merging
from kvpress.formulas.ranking import gather, kept_index
from kvpress.ops import Bounds, Columns, Pages, Turning
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.together import evicting, of_all
from kvpress.policy.slots import Slots
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.types import EMPTY


def compact(
    layer: Layer,
    group: Sequence[int],
    slots: Slots,
    kept_BHS: Tensor,
    counts_BH: Tensor,
    continues_eviction: bool = False,
) -> dict[str, Tensor]:
    """The columns of the slots that stay of some sequences, dense `[b, H, K, ...]`.

    counts_BH: how many stay of each row, on the host. continues_eviction: whether this is a part of
    the eviction before: then the threshold of merging stays where that one set it.
    """
    with layer.timed("select"):
        index_BHK = kept_index(kept_BHS, counts_BH)
        columns = {name: gather(slots.fetch(name), index_BHK) for name in layer.rows.rewritten}
    rule = layer.recipe.merging
    evicted_BHS = (slots.position_BHS != EMPTY) & ~kept_BHS
    if rule is not None and evicting(layer, bool(evicted_BHS.any())):
        with layer.timed("merge"):
            part = rule._replace(memory=1.0, gain=0.0) if continues_eviction else rule
            columns |= _absorb(layer, group, slots, columns, evicted_BHS, counts_BH, part)
    return columns


def merge_one(layer: Layer, pages: Pages, columns: Columns, bounds: Bounds) -> None:
    """One eviction of rows above their quotas, merged, while decoding: one operator call.

    Pages and columns are changed in place.
    """
    rule, turns = layer.recipe.merging, layer.rotation
    assert rule is not None, "only recipes that merge absorb"
    turning = Turning()
    if rule.keys == "unrotated" and turns is not None:
        frequency_F = turns.frequency_F.to(layer.rows.device)  # the model may have moved
        turning = Turning(frequency_F, turns.interleaved, turns.start)
    threshold_B = layer.sequences.threshold_B
    ops.absorb_step(pages, columns, bounds, threshold_B, turning, layer.key_width, rule)


def _absorb(
    layer: Layer,
    group: Sequence[int],
    slots: Slots,
    columns: dict[str, Tensor],
    evicted_BHS: Tensor,
    counts_BH: Tensor,
    rule: Merging,
) -> dict[str, Tensor]:
    """The kept keys and values with the evicted ones merged into them."""
    index_BHV, lost_BHV = _evicted(slots, evicted_BHS, rule)
    key_BHKD, evicted_BHVD = columns[KEY], gather(slots.fetch(KEY), index_BHV)
    width, own = layer.key_width, list(group)
    similarity_BHV, target_BHV = ops.match_keys(
        evicted_BHVD[..., :width],
        key_BHKD[..., :width],
        _allowed(layer, group, columns[POSITION], counts_BH, rule),
    )
    real_BHV = lost_BHV & (target_BHV >= 0)
    target_BHV = target_BHV.clamp_min(0)
    merged_BHV = _merged(layer, own, similarity_BHV, real_BHV, rule)
    shares = merging.shares(rule, similarity_BHV, target_BHV, merged_BHV, key_BHKD.shape[2])
    value_BHKE = shares.add(columns[VALUE], gather(slots.fetch(VALUE), index_BHV))
    own_BHKD, extra_BHKX = key_BHKD.tensor_split((width,), dim=-1)
    if rule.keys != "values_only":
        lost_BHVD = evicted_BHVD[..., :width]
        if rule.keys == "unrotated" and layer.rotation is not None:
            to_BHV = columns[POSITION].gather(2, target_BHV)
            by_BHV = to_BHV - slots.position_BHS.gather(2, index_BHV)
            lost_BHVD = layer.rotation.turn(lost_BHVD, by_BHV)
        own_BHKD = shares.add(own_BHKD, lost_BHVD)
    if rule.counts:
        counts = (key_BHKD[..., -1], evicted_BHVD[..., -1], target_BHV, merged_BHV)
        bias_BHK1 = merging.add_counts(*counts)[..., None]
        extra_BHKX = torch.cat([extra_BHKX[..., :-1], bias_BHK1], dim=-1)
    return {KEY: torch.cat([own_BHKD, extra_BHKX], dim=-1), VALUE: value_BHKE}


def _merged(
    layer: Layer, group: list[int], similarity_BHV: Tensor, real_BHV: Tensor, rule: Merging
) -> Tensor:
    """Which evicted slots are merged: the rows of all processes have one threshold a sequence."""
    every = of_all(layer, similarity_BHV), of_all(layer, real_BHV)
    threshold_b = layer.sequences.threshold_B[group]
    threshold_b = merging.next_threshold(rule, threshold_b, *every)
    layer.sequences.threshold_B[group] = threshold_b
    merged_BHV = merging.merged(rule, threshold_b, *every)
    return layer.kind.own(merged_BHV, 1)[..., : real_BHV.shape[2]]


def _evicted(slots: Slots, evicted_BHS: Tensor, rule: Merging) -> tuple[Tensor, Tensor]:
    """The indices of the evicted slots `[B, H, E]`, and which of these are there."""
    losses_BH = evicted_BHS.sum(-1)
    index_BHV = kept_index(evicted_BHS, losses_BH)
    lost_BHV = torch.arange(index_BHV.shape[2], device=losses_BH.device) < losses_BH[..., None]
    if rule.together:  # ranks are those of positions, and slots may stand in any order
        position_BHV = slots.position_BHS.gather(2, index_BHV).masked_fill(~lost_BHV, 2**31 - 1)
        index_BHV = index_BHV.gather(2, position_BHV.argsort(dim=-1, stable=True))
    return index_BHV, lost_BHV


def _allowed(
    layer: Layer, group: Sequence[int], position_BHK: Tensor, counts_BH: Tensor, rule: Merging
) -> Tensor:
    """The kept slots that others may be merged into: bool `[B, H, K]`."""
    stays_BHK = host.arange(position_BHK.shape[2]) < counts_BH[..., None]
    allowed_BHK = stays_BHK.to(position_BHK.device)
    if rule.sinks or layer.limits is None:
        return allowed_BHK
    return allowed_BHK & (position_BHK >= layer.sequences.sink_B[list(group), None, None])
