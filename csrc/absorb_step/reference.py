"""PyTorch reference of `absorb_step`: victims, matches, thresholds and merges in turn."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from kvpress.csrc.absorb_step import WRITES, Operands
from kvpress.csrc.decode_step.reference import (
    check_layer,
    check_rank,
    drop,
    held_slots,
    of_layer,
    victims,
)
from kvpress.csrc.match_keys import Operands as MatchKeys
from kvpress.csrc.match_keys.reference import match_keys
from torch import Tensor

from kvpress.formulas import merging
from kvpress.formulas.merging import KeyMerge, Merging
from kvpress.formulas.rotation import Rotation
from kvpress.ops import shapes

KEY_MERGES = get_args(KeyMerge)


class Merge(NamedTuple):
    """One eviction per row: what goes, what it is merged into, and whether it is."""

    victim_BH1: Tensor
    target_BH1: Tensor
    similarity_BH1: Tensor
    merged_BH1: Tensor
    key_BHSD: Tensor  # of all slots
    value_BHSE: Tensor
    by_BH1: Tensor  # how much later the target is


def absorb_step(operands: Operands) -> None:
    """Evicts one slot of every row above its quota and merges it; see README.md for the rule.

    Raises OperatorError.
    """
    check(operands)
    pages, columns, bounds, threshold_B, _, width, rule = operands
    if not pages.table_RW.shape[1] or not len(pages.key_PDS):
        return  # no row has a slot
    batch = len(bounds.seen_B)
    held = held_slots(pages, columns, batch)
    victim_BH, open_BH = victims(held, columns, bounds)
    goes_BH = (pages.counts_R > bounds.quota_R).view(batch, -1) & open_BH
    key_BHSD, value_BHSE = (
        pool_PSX.flatten(0, 1)[held.address_RS].view(*held.position_BHS.shape, -1)
        for pool_PSX in (pages.key_PDS.mT, pages.value_PSE)
    )
    victim_BH1 = victim_BH[..., None]
    others_BHS = held.held_BHS.scatter(2, victim_BH1, False)
    if not rule.sinks:
        others_BHS &= held.position_BHS >= bounds.sink_B[:, None, None]
    lost_BH1D = _take(key_BHSD, victim_BH1)
    near = MatchKeys(lost_BH1D[..., :width], key_BHSD[..., :width], others_BHS)
    u_BH1, target_BH1 = match_keys(near)
    real_BH1 = goes_BH[..., None] & (target_BH1 >= 0)
    target_BH1 = target_BH1.clamp_min(0)
    threshold_B.copy_(merging.next_threshold(rule, threshold_B, u_BH1, real_BH1))
    merged_BH1 = merging.merged(rule, threshold_B, u_BH1, real_BH1)
    position_BHS = held.position_BHS
    by_BH1 = position_BHS.gather(2, target_BH1) - position_BHS.gather(2, victim_BH1)
    merge = Merge(victim_BH1, target_BH1, u_BH1, merged_BH1, key_BHSD, value_BHSE, by_BH1)
    _write(operands, held.address_RS, merge)
    drop(pages, columns, held, victim_BH, goes_BH.flatten())


def _write(operands: Operands, address_RS: Tensor, merge: Merge) -> None:
    """Writes the merged keys and values of the rows that merge."""
    pages, into_R = operands.pages, merge.merged_BH1.flatten()
    key_RD, value_RE = (x.flatten(0, 2)[into_R] for x in merged(operands, merge))
    address_R = address_RS.gather(1, merge.target_BH1.flatten()[:, None])[into_R, 0]
    page_slots = pages.key_PDS.shape[2]
    page_R, offset_R = address_R // page_slots, address_R % page_slots
    pages.key_PDS[page_R, :, offset_R] = key_RD
    pages.value_PSE[page_R, offset_R] = value_RE


def merged(operands: Operands, merge: Merge) -> tuple[Tensor, Tensor]:
    """The key and the value of every row's target with those of its victim in them."""
    rule, turning, width = operands.merging, operands.turning, operands.width
    first_BH1 = torch.zeros_like(merge.target_BH1)  # of one kept slot per row
    parts = merging.shares(rule, merge.similarity_BH1, first_BH1, merge.merged_BH1, 1)
    kept_BH1D, lost_BH1D = (
        _take(merge.key_BHSD, slot_BH1) for slot_BH1 in (merge.target_BH1, merge.victim_BH1)
    )
    own_key, extra = kept_BH1D[..., :width], kept_BH1D[..., width:]
    lost_key = lost_BH1D[..., :width]
    if turning.frequency_F is not None:
        rotation = Rotation(turning.frequency_F, turning.interleaved, turning.start)
        lost_key = rotation.turn(lost_key, merge.by_BH1)
    if rule.keys != "values_only":
        own_key = parts.add(own_key, lost_key)
    if rule.counts:
        biases = (kept_BH1D[..., -1], lost_BH1D[..., -1])
        extra = extra.clone()
        extra[..., -1] = merging.add_counts(*biases, first_BH1, merge.merged_BH1)
    own_value, lost_value = (
        _take(merge.value_BHSE, slot_BH1) for slot_BH1 in (merge.target_BH1, merge.victim_BH1)
    )
    return torch.cat([own_key, extra], dim=-1), parts.add(own_value, lost_value)


def _take(x_BHSD: Tensor, slot_BH1: Tensor) -> Tensor:
    index = slot_BH1[..., None].expand(*slot_BH1.shape, x_BHSD.shape[-1])
    return x_BHSD.gather(2, index)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "absorb_step"
    pages, columns, bounds, threshold_B, turning, _, rule = operands
    floats = {"threshold_B": threshold_B}
    floats |= {} if turning.frequency_F is None else {"frequency_F": turning.frequency_F}
    tensors = {**of_layer(pages, columns, bounds), **floats}
    lengths = shapes.bind(op, tensors)
    check_layer(op, pages, columns, bounds)
    shapes.of_dtype(op, torch.float32, floats)
    if not lengths["B"] or lengths["R"] % lengths["B"]:
        shapes.refuse(op, f"table_RW has {lengths['R']} rows for {lengths['B']} sequences")
    heads = lengths["R"] // lengths["B"]
    shapes.paged(op, {**lengths, "N": heads}, pages.table_RW, pages.counts_R)
    shapes.apart(op, tensors, WRITES)
    check_rank(op, bounds, columns.mass_PS is None)
    _check_channels(op, operands)
    check_rule(op, rule)
    shapes.ages(op, bounds, 0)


def check_rule(op: str, rule: Merging) -> None:
    """Raises OperatorError for a rule of merging that is none."""
    numbers = (rule.own, *rule.motion)
    if not all(abs(x) <= shapes.MOST for x in numbers):
        given = ", ".join(map(str, numbers))
        shapes.refuse(op, f"own, memory, gain are {given}; −1e6 to 1e6 are allowed")
    if rule.keys not in KEY_MERGES:
        shapes.refuse(op, f"keys={rule.keys!r} is unknown; allowed: {', '.join(KEY_MERGES)}")


def _check_channels(op: str, operands: Operands) -> None:
    """Raises OperatorError for channels that keys do not have."""
    (frequency_F, _, start), width, rule = operands.turning, operands.width, operands.merging
    stored = operands.pages.key_PDS.shape[1]
    if not 1 <= width <= stored - rule.counts:
        counts = int(rule.counts)
        shapes.refuse(op, f"width is {width}; keys have {stored} channels, {counts} of counts")
    pairs = 0 if frequency_F is None else len(frequency_F)
    if start < 0 or start + 2 * pairs > width:
        shapes.refuse(op, f"{pairs} pairs of channels from {start} on do not fit into {width}")
    if pairs and rule.keys == "values_only":
        shapes.refuse(op, "frequency_F is given, but keys are not merged")
