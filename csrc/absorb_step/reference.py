"""PyTorch reference of `absorb_step`: victims, matches, thresholds and merges in turn."""

from __future__ import annotations

import torch
from kvpress.csrc.decode_rows.reference import pages_of
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.match_keys.reference import match_keys
from torch import Tensor

from kvpress.formulas import merging
from kvpress.formulas.merging import Merging
from kvpress.formulas.ranking import drop_one, protect, ranking
from kvpress.formulas.rotation import Rotation
from kvpress.ops import shapes
from kvpress.types import EMPTY


def absorb_step(
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
    sink: int,
    rank: str,
    threshold_B: Tensor,
    frequency_F: Tensor | None,
    interleaved: bool,
    start: int,
    width: int,
    own: float,
    memory: float,
    gain: float,
    largest: bool,
    normalised: bool,
    together: bool,
    keys: bool,
    sinks: bool,
    counts: bool,
) -> None:
    """Evicts one slot of every row above its quota and merges it; see README.md for the rule.

    width: the channels of keys that are compared and merged. Raises OperatorError.
    """
    pools, books = (key_PDS, value_PSE, position_PS, mass_PS), (table_RW, counts_R)
    check(*pools, *books, seen_B, quota_R, recent_B, threshold_B, frequency_F)
    check_choices(key_PDS, mass_PS, frequency_F, rank, start, width, keys, counts)
    check_rule(own, memory, gain)
    shapes.ages("absorb_step", seen_B, recent_B, sink, 0)
    if not table_RW.shape[1] or not len(key_PDS):
        return  # no row has a slot
    rule = Merging(own, memory, gain, largest, normalised, together)
    batch, page_slots = len(seen_B), key_PDS.shape[2]
    row_R = torch.arange(len(counts_R), device=counts_R.device)
    slot_S = torch.arange(table_RW.shape[1] * page_slots, device=counts_R.device)
    held_BHS = (slot_S < counts_R[:, None]).view(batch, -1, len(slot_S))
    page_RW = pages_of(table_RW, counts_R, page_slots).view(table_RW.shape)
    address_RS = page_RW.repeat_interleave(page_slots, 1) * page_slots + slot_S % page_slots
    position_RS = position_PS.flatten()[address_RS].long()
    position_BHS = position_RS.view(held_BHS.shape).masked_fill(~held_BHS, EMPTY)
    mass_BHS = None if mass_PS is None else mass_PS.flatten()[address_RS].view(held_BHS.shape)

    guarded_BHS = protect(position_BHS, seen_B, sink, recent_B)
    open_BHS = ~guarded_BHS & held_BHS
    score_BHS = ranking(rank, position_BHS, mass_BHS, seen_B)
    victim_BH1 = drop_one(score_BHS, position_BHS, guarded_BHS)[..., None]
    goes_BH1 = ((counts_R > quota_R).view(batch, -1) & open_BHS.any(-1))[..., None]

    key_BHSD = key_PDS.mT.flatten(0, 1)[address_RS].unflatten(0, held_BHS.shape[:2])
    others_BHS = held_BHS & (slot_S != victim_BH1)
    if not sinks:
        others_BHS &= position_BHS >= sink
    lost_BH1D = _take(key_BHSD, victim_BH1)
    u_BH1, target_BH1 = match_keys(lost_BH1D[..., :width], key_BHSD[..., :width], others_BHS)
    real_BH1 = goes_BH1 & (target_BH1 >= 0)
    target_BH1 = target_BH1.clamp_min(0)
    threshold_B.copy_(merging.next_threshold(rule, threshold_B, u_BH1, real_BH1))
    merged_BH1 = merging.merged(rule, threshold_B, u_BH1, real_BH1)

    nearest_BH1D = _take(key_BHSD, target_BH1)
    first_BH1 = torch.zeros_like(target_BH1)  # of one kept slot per row
    parts = merging.shares(rule, u_BH1, first_BH1, merged_BH1, 1)
    own_key, lost_key = nearest_BH1D[..., :width], lost_BH1D[..., :width]
    if frequency_F is not None:
        by_BH1 = position_BHS.gather(2, target_BH1) - position_BHS.gather(2, victim_BH1)
        lost_key = Rotation(frequency_F, interleaved, start).turn(lost_key, by_BH1)
    if keys:
        own_key = parts.add(own_key, lost_key)
    extra = nearest_BH1D[..., width:]
    if counts:
        biases = (nearest_BH1D[..., -1], lost_BH1D[..., -1])
        extra = extra.clone()
        extra[..., -1] = merging.add_counts(*biases, first_BH1, merged_BH1)

    def place(slot_R: Tensor) -> tuple[Tensor, Tensor]:
        return page_RW[row_R, slot_R // page_slots], slot_R % page_slots

    page_R, offset_R = place(target_BH1.flatten())
    lost_page_R, lost_offset_R = place(victim_BH1.flatten())
    own_value = value_PSE[page_R, offset_R].view(batch, -1, 1, value_PSE.shape[2])
    lost_value = value_PSE[lost_page_R, lost_offset_R].view_as(own_value)
    into_R = merged_BH1.flatten()
    new_key_RD = torch.cat([own_key, extra], dim=-1).flatten(0, 2)
    new_value_RE = parts.add(own_value, lost_value).flatten(0, 2)
    key_PDS[page_R[into_R], :, offset_R[into_R]] = new_key_RD[into_R]
    value_PSE[page_R[into_R], offset_R[into_R]] = new_value_RE[into_R]

    moves_R = goes_BH1.flatten()
    from_page_R, from_offset_R = place((counts_R - 1).clamp_min(0))
    to = (lost_page_R[moves_R], lost_offset_R[moves_R])
    source = (from_page_R[moves_R], from_offset_R[moves_R])
    for pool in (value_PSE, position_PS, mass_PS):
        if pool is not None:
            pool[to] = pool[source]
    key_PDS[to[0], :, to[1]] = key_PDS[source[0], :, source[1]]
    counts_R -= moves_R.to(counts_R.dtype)


def _take(key_BHSD: Tensor, slot_BH1: Tensor) -> Tensor:
    index = slot_BH1[..., None].expand(*slot_BH1.shape, key_BHSD.shape[-1])
    return key_BHSD.gather(2, index)


def check(
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
    threshold_B: Tensor,
    frequency_F: Tensor | None,
) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op = "absorb_step"
    pools = {"key_PDS": key_PDS, "value_PSE": value_PSE}
    words = {"position_PS": position_PS, "table_RW": table_RW}
    longs = {"counts_R": counts_R, "seen_B": seen_B, "quota_R": quota_R, "recent_B": recent_B}
    floats = {"threshold_B": threshold_B}
    floats |= {} if mass_PS is None else {"mass_PS": mass_PS}
    floats |= {} if frequency_F is None else {"frequency_F": frequency_F}
    lengths = shapes.bind(op, {**pools, **words, **longs, **floats})
    shapes.floating(op, pools)
    shapes.of_dtype(op, key_PDS.dtype, pools)
    shapes.of_dtype(op, torch.int32, words)
    shapes.of_dtype(op, torch.int64, longs)
    shapes.of_dtype(op, torch.float32, floats)
    if not lengths["B"] or lengths["R"] % lengths["B"]:
        shapes.refuse(op, f"table_RW has {lengths['R']} rows for {lengths['B']} sequences")
    shapes.paged(op, {**lengths, "N": lengths["R"] // lengths["B"]}, table_RW, counts_R)
    written = {*pools, *floats, "position_PS", "counts_R"} - {"frequency_F"}
    shapes.apart(op, {**pools, **words, **longs, **floats}, written)


def check_rule(*numbers: float) -> None:
    """Raises OperatorError for a rule of merging that is no number."""
    if not all(abs(x) <= shapes.MOST for x in numbers):
        given = ", ".join(map(str, numbers))
        shapes.refuse("absorb_step", f"own, memory, gain are {given}; −1e6 to 1e6 are allowed")


def check_choices(
    key_PDS: Tensor,
    mass_PS: Tensor | None,
    frequency_F: Tensor | None,
    rank: str,
    start: int,
    width: int,
    keys: bool,
    counts: bool,
) -> None:
    """Raises OperatorError for options outside their range."""
    op, stored = "absorb_step", key_PDS.shape[1]
    if rank not in RANKS:
        shapes.refuse(op, f"rank={rank!r} is unknown; allowed: {', '.join(RANKS)}")
    if mass_PS is None and rank != "position":
        shapes.refuse(op, f"rank={rank!r} needs mass_PS")
    if not 1 <= width <= stored - counts:
        shapes.refuse(op, f"width is {width}; keys have {stored} channels, {int(counts)} of counts")
    pairs = 0 if frequency_F is None else len(frequency_F)
    if start < 0 or start + 2 * pairs > width:
        shapes.refuse(op, f"{pairs} pairs of channels from {start} on do not fit into {width}")
    if pairs and not keys:
        shapes.refuse(op, "frequency_F is given, but keys are not merged")
