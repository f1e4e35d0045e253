"""Triton kernels of `absorb_step`: victims and matches row by row, then merges by sequence.

Nothing is read back: which slots go and where they are merged is found and done on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kvpress.csrc.absorb_step.reference import check, check_choices, check_rule
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.decode_step.triton_kernel import consider, rank_of, worst
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.ops.shapes import ages

ELEMENTS = 4096  # of keys in a block of `find_kernel`


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
    """The same as the reference, in two launches. Raises OperatorError."""
    pools, books = (key_PDS, value_PSE, position_PS, mass_PS), (table_RW, counts_R)
    check(*pools, *books, seen_B, quota_R, recent_B, threshold_B, frequency_F)
    check_choices(key_PDS, mass_PS, frequency_F, rank, start, width, keys, counts)
    check_rule(own, memory, gain)
    ages("absorb_step", seen_B, recent_B, sink, 0)
    if not table_RW.shape[1] or not len(key_PDS):
        return  # no row has a slot
    batch, rows = len(seen_B), len(counts_R)
    stored, value_width = key_PDS.shape[1], value_PSE.shape[2]
    slot_2R = torch.empty(2, rows, dtype=torch.int32, device=key_PDS.device)
    similarity_R = torch.empty(rows, dtype=torch.float32, device=key_PDS.device)
    mass = position_PS if mass_PS is None else mass_PS
    losses = (slot_2R, similarity_R, table_RW, counts_R)
    block_d = triton.next_power_of_2(stored)
    with device_of(key_PDS):
        find_kernel[(rows,)](
            *(key_PDS, position_PS, mass, *losses, seen_B, quota_R, recent_B),
            *(sink, table_RW.shape[1]),
            HEADS=rows // batch,
            D=stored,
            WIDTH=width,
            PAGE=key_PDS.shape[2],
            RANK=RANKS.index(rank),
            KEEPS=mass_PS is not None,
            SINKS=sinks,
            BLOCK_S=max(16, ELEMENTS // block_d),
            BLOCK_D=block_d,
            num_warps=4,
            **FUSED,
        )
        merge_kernel[(batch,)](
            *(key_PDS, value_PSE, position_PS, mass, *losses, threshold_B),
            *(threshold_B if frequency_F is None else frequency_F, table_RW.shape[1]),
            *(start, own, memory, gain),
            HEADS=rows // batch,
            D=stored,
            WIDTH=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            PAIRS=0 if frequency_F is None else len(frequency_F),
            INTERLEAVED=interleaved,
            LARGEST=largest,
            NORMALISED=normalised,
            TOGETHER=together,
            KEYS=keys,
            COUNTS=counts,
            HAS_MASS=mass_PS is not None,
            BLOCK_H=triton.next_power_of_2(rows // batch),
            BLOCK_D=block_d,
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=4,
            **FUSED,
        )


@triton.jit(do_not_specialize=["sink", "table_width"])
def find_kernel(
    key,
    position,
    mass,
    slots_of,
    similarity,
    table,
    counts,
    seen,
    quota,
    recent,
    sink,
    table_width,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    RANK: tl.constexpr,
    KEEPS: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: the slot that goes, the slot with the nearest key, and their cosine."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row).to(tl.int32)
    now = tl.load(seen + row // HEADS).to(tl.int32)
    open_to = tl.maximum(now - tl.load(recent + row // HEADS), 0)
    table += row * table_width
    slots_of += row
    rows = tl.num_programs(0)
    tl.store(slots_of, -1)
    tl.store(slots_of + rows, -1)
    if count <= tl.load(quota + row):
        return
    lowest_S = tl.full([BLOCK_S], float("inf"), tl.float32)
    latest_S = tl.full([BLOCK_S], -1, tl.int32)
    victim_S = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        page_S = tl.load(table + s_S // PAGE, mask=s_S < count, other=0).to(tl.int64)
        address_S = page_S * PAGE + s_S % PAGE
        position_S = tl.load(position + address_S, mask=s_S < count, other=-1)
        mass_S = position_S.to(tl.float32)
        if KEEPS:
            mass_S = tl.load(mass + address_S, mask=s_S < count, other=0)
        score_S = rank_of(mass_S, position_S, now, RANK)
        open_S = (s_S < count) & (position_S >= sink) & (position_S < open_to)
        lowest_S, latest_S, victim_S = consider(
            lowest_S, latest_S, victim_S, score_S, position_S, s_S, open_S
        )
    latest, victim = worst(lowest_S, latest_S, victim_S)
    if latest < 0:
        return
    d_D = tl.arange(0, BLOCK_D)
    own_page = tl.load(table + victim // PAGE).to(tl.int64)
    from_D = key + (own_page * D + d_D) * PAGE + victim % PAGE
    key_D = tl.load(from_D, mask=d_D < WIDTH, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(key_D * key_D, 0))
    key_D = tl.where(norm < float("inf"), key_D, 0.0) / tl.where(norm == 0, 1.0, norm)
    best_S = tl.full([BLOCK_S], float("-inf"), tl.float32)
    at_S = tl.full([BLOCK_S], -1, tl.int32)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        page_S = tl.load(table + s_S // PAGE, mask=s_S < count, other=0).to(tl.int64)
        position_S = tl.load(position + page_S * PAGE + s_S % PAGE, mask=s_S < count, other=-1)
        other_DS = tl.load(
            key + (page_S * (D * PAGE) + s_S % PAGE)[None, :] + d_D[:, None] * PAGE,
            mask=(d_D < WIDTH)[:, None] & (s_S < count)[None, :],
            other=0,
        ).to(tl.float32)
        square_S = tl.sum(other_DS * other_DS, 0)
        dot_S = tl.sum(other_DS * key_D[:, None], 0)
        u_S = tl.where(square_S == 0, 0.0, dot_S / tl.sqrt(tl.where(square_S == 0, 1.0, square_S)))
        allowed_S = (s_S < tl.where(norm < float("inf"), count, 0)) & (s_S != victim)
        allowed_S = allowed_S & (square_S < float("inf"))  # neither infinite nor a NaN
        if not SINKS:
            allowed_S = allowed_S & (position_S >= sink)
        better_S = allowed_S & (u_S > best_S)
        best_S = tl.where(better_S, u_S, best_S)
        at_S = tl.where(better_S, s_S, at_S)
    best = tl.max(best_S, 0)
    target = tl.min(tl.where((best_S == best) & (at_S >= 0), at_S, 2147483647), 0)
    tl.store(slots_of, victim)
    tl.store(slots_of + rows, tl.where(best == float("-inf"), -1, target))
    tl.store(similarity + row, best)


@triton.jit(do_not_specialize=["table_width", "start"])
def merge_kernel(
    key,
    value,
    position,
    mass,
    slots_of,
    similarity,
    table,
    counts,
    threshold,
    frequency,
    table_width,
    start,
    own,
    memory,
    gain,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LARGEST: tl.constexpr,
    NORMALISED: tl.constexpr,
    TOGETHER: tl.constexpr,
    KEYS: tl.constexpr,
    COUNTS: tl.constexpr,
    HAS_MASS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One sequence: its threshold, its merges, and the last slots into the gaps."""
    sequence = tl.program_id(0).to(tl.int64)
    first, rows = sequence * HEADS, tl.num_programs(0) * HEADS
    h_H = tl.arange(0, BLOCK_H)
    target_H = tl.load(slots_of + rows + first + h_H, mask=h_H < HEADS, other=-1)
    u_H = tl.load(similarity + first + h_H, mask=target_H >= 0, other=0)
    matched = tl.sum((target_H >= 0).to(tl.int32), 0)
    mean = tl.sum(u_H, 0) / tl.maximum(matched, 1).to(tl.float32)
    news = mean
    if LARGEST:
        news = tl.max(tl.where(target_H >= 0, u_H, float("-inf")), 0)
    before = tl.load(threshold + sequence)
    after = tl.where(before != before, mean, memory * before + gain * news)
    after = tl.where(matched > 0, after, before)
    tl.debug_barrier()  # all threads have read it
    tl.store(threshold + sequence, after)

    d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for head in range(HEADS):
        row = first + head
        victim, target = tl.load(slots_of + row), tl.load(slots_of + rows + row)
        count = tl.load(counts + row).to(tl.int32)
        pages = table + row * table_width
        # What a table names for a row without slots may not exist.
        of_victim_at = pages + tl.maximum(victim, 0) // PAGE
        from_page = tl.load(of_victim_at, mask=victim >= 0, other=0).to(tl.int64)
        from_offset = tl.maximum(victim, 0) % PAGE
        of_target_at = pages + tl.maximum(target, 0) // PAGE
        to_page = tl.load(of_target_at, mask=target >= 0, other=0).to(tl.int64)
        to_offset = tl.maximum(target, 0) % PAGE
        u = tl.load(similarity + row, mask=target >= 0, other=0)
        judged = u
        if TOGETHER:
            judged = mean
        merges = (target >= 0) & (judged >= after)
        weight, whole, own_part = u, 2.0, 0.5
        if NORMALISED:
            weight = tl.exp(u)
            whole = own + weight
            own_part = own / whole
        part = weight / whole

        from_E = value + (from_page * PAGE + from_offset) * E + e_E
        to_E = value + (to_page * PAGE + to_offset) * E + e_E
        value_mask = e_E < tl.where(merges, E, 0)
        lost_E = tl.load(from_E, mask=value_mask, other=0).to(tl.float32)
        kept_E = tl.load(to_E, mask=value_mask, other=0).to(tl.float32)
        tl.store(
            to_E, (kept_E * own_part + lost_E * part).to(value.dtype.element_ty), mask=value_mask
        )
        from_key = key + from_page * (D * PAGE) + from_offset
        to_key = key + to_page * (D * PAGE) + to_offset
        if KEYS:
            key_mask = d_D < tl.where(merges, WIDTH, 0)
            lost_D = tl.load(from_key + d_D * PAGE, mask=key_mask, other=0).to(tl.float32)
            if PAIRS > 0:
                by = tl.load(position + to_page * PAGE + to_offset) - tl.load(
                    position + from_page * PAGE + from_offset
                )
                lost_D = turned(
                    from_key, lost_D, d_D, frequency, start, by, key_mask, PAGE, PAIRS, INTERLEAVED
                )
            kept_D = tl.load(to_key + d_D * PAGE, mask=key_mask, other=0).to(tl.float32)
            merged_D = kept_D * own_part + lost_D * part
            tl.store(to_key + d_D * PAGE, merged_D.to(key.dtype.element_ty), mask=key_mask)
        if COUNTS:
            of_victim = tl.load(from_key + (D - 1) * PAGE).to(tl.float32)
            of_target = tl.load(to_key + (D - 1) * PAGE).to(tl.float32)
            total = tl.log(tl.exp(of_victim) + tl.exp(of_target)).to(key.dtype.element_ty)
            tl.store(to_key + (D - 1) * PAGE, total, mask=merges)
        tl.debug_barrier()  # the last slot may be the one that was merged into, by other threads
        if victim >= 0:
            last_page = tl.load(pages + (count - 1) // PAGE).to(tl.int64)
            last = (count - 1) % PAGE
            moved_D = tl.load(key + last_page * (D * PAGE) + last + d_D * PAGE, mask=d_D < D)
            tl.store(from_key + d_D * PAGE, moved_D, mask=d_D < D)
            moved_E = tl.load(value + (last_page * PAGE + last) * E + e_E, mask=e_E < E)
            tl.store(from_E, moved_E, mask=e_E < E)
            to = from_page * PAGE + from_offset
            tl.store(position + to, tl.load(position + last_page * PAGE + last))
            if HAS_MASS:
                tl.store(mass + to, tl.load(mass + last_page * PAGE + last))
            tl.store(counts + row, (count - 1).to(tl.int64))


@triton.jit
def turned(
    from_key,
    lost_D,
    d_D,
    frequency,
    start,
    by,
    mask_D,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """A key as it is `by` positions later."""
    at_D = d_D - start
    rotates_D = mask_D & (at_D >= 0) & (at_D < 2 * PAIRS)
    if INTERLEAVED:
        pair_D, second_D = at_D // 2, at_D % 2
        partner_D = d_D + 1 - 2 * second_D
    else:
        pair_D, second_D = at_D % PAIRS, at_D // PAIRS
        partner_D = d_D + PAIRS - 2 * PAIRS * second_D
    angle_D = by.to(tl.float32) * tl.load(frequency + pair_D, mask=rotates_D, other=0)
    other_D = tl.load(from_key + partner_D * PAGE, mask=rotates_D, other=0).to(tl.float32)
    sign_D = tl.where(second_D == 0, -1.0, 1.0)
    return lost_D * tl.cos(angle_D) + sign_D * other_D * tl.sin(angle_D)
