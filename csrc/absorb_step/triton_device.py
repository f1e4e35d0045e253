"""Device code of `absorb_step`: which slot of a row goes, and what it is merged into."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.decode_step.triton_device import consider, move_last, no_victim, rank_of, worst
from kvpress.csrc.triton_common import address_of


@triton.jit
def lowest(
    position, mass, table, count, now, open_to, sink, PAGE: tl.constexpr, RANK: tl.constexpr,
    KEEPS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The position and the slot of the one that ranks lowest; −1: all are protected."""
    lowest_S, latest_S, victim_S = no_victim(BLOCK_S)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        address_S = address_of(table, s_S, count, PAGE)
        position_S = tl.load(position + address_S, mask=s_S < count, other=-1)
        mass_S = position_S.to(tl.float32)
        if KEEPS:
            mass_S = tl.load(mass + address_S, mask=s_S < count, other=0)
        score_S = rank_of(mass_S, position_S, now, RANK)
        open_S = (s_S < count) & (position_S >= sink) & (position_S < open_to)
        lowest_S, latest_S, victim_S = consider(
            lowest_S, latest_S, victim_S, score_S, position_S, s_S, open_S
        )
    return worst(lowest_S, latest_S, victim_S)


@triton.jit
def unit_key(
    key, table, slot, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The key of a slot at length 1, and its length; zeros where that is no number."""
    d_D = tl.arange(0, BLOCK_D)
    page = tl.load(table + slot // PAGE).to(tl.int64)
    from_D = key + (page * D + d_D) * PAGE + slot % PAGE
    key_D = tl.load(from_D, mask=d_D < WIDTH, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(key_D * key_D, 0))
    return tl.where(norm < float("inf"), key_D, 0.0) / tl.where(norm == 0, 1.0, norm), norm


@triton.jit
def nearest(
    key, position, table, key_D, norm, victim, count, sink, D: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, SINKS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cosine and the slot of the nearest other key; −inf where there is none."""
    d_D = tl.arange(0, BLOCK_D)
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
    return best, tl.min(tl.where((best_S == best) & (at_S >= 0), at_S, 2147483647), 0)


@triton.jit(do_not_specialize=["table_width"])
def find_kernel(
    key, position, mass, slots_of, similarity, table, counts, seen, quota, recent, sinks,
    table_width, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, RANK: tl.constexpr, KEEPS: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: the slot that goes, the slot with the nearest key, and their cosine."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row).to(tl.int32)
    now = tl.load(seen + row // HEADS).to(tl.int32)
    open_to = tl.maximum(now - tl.load(recent + row), 0)
    sink = tl.load(sinks + row // HEADS)
    table += row * table_width
    slots_of += row
    rows = tl.num_programs(0)
    tl.store(slots_of, -1)
    tl.store(slots_of + rows, -1)
    if count <= tl.load(quota + row):
        return
    latest, victim = lowest(
        position, mass, table, count, now, open_to, sink, PAGE, RANK, KEEPS, BLOCK_S
    )
    if latest < 0:
        return
    key_D, norm = unit_key(key, table, victim, D, WIDTH, PAGE, BLOCK_D)
    best, target = nearest(
        key, position, table, key_D, norm, victim, count, sink,
        D, WIDTH, PAGE, SINKS, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    tl.store(slots_of, victim)
    tl.store(slots_of + rows, tl.where(best == float("-inf"), -1, target))
    tl.store(similarity + row, best)


@triton.jit
def next_threshold(
    slots_of, similarity, threshold, sequence, rows, memory, gain,
    HEADS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Moves the threshold of a sequence. Returns it and the mean cosine of its rows."""
    first = sequence * HEADS
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
    return after, mean


@triton.jit
def place_of(table, slot, PAGE: tl.constexpr):
    """Page and offset of a slot. Of none page 0: what tables name for empty rows may not exist."""
    at = table + tl.maximum(slot, 0) // PAGE
    return tl.load(at, mask=slot >= 0, other=0).to(tl.int64), tl.maximum(slot, 0) % PAGE


@triton.jit
def parts_of(u, own, NORMALISED: tl.constexpr):
    """What the kept slot and the evicted one count."""
    weight, whole, own_part = u, 2.0, 0.5
    if NORMALISED:
        weight = tl.exp(u)
        whole = own + weight
        own_part = own / whole
    return own_part, weight / whole


@triton.jit
def merge_values(to_E, from_E, merges, own_part, part, e_E, E: tl.constexpr):
    """Adds the value of the evicted slot to that of the kept one."""
    mask_E = e_E < tl.where(merges, E, 0)
    lost_E = tl.load(from_E, mask=mask_E, other=0).to(tl.float32)
    kept_E = tl.load(to_E, mask=mask_E, other=0).to(tl.float32)
    tl.store(to_E, (kept_E * own_part + lost_E * part).to(to_E.dtype.element_ty), mask=mask_E)


@triton.jit
def merge_keys(
    to_key, from_key, to_position, from_position, merges, own_part, part, frequency, start,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same for keys, the evicted one turned to the position of the kept one."""
    d_D = tl.arange(0, BLOCK_D)
    mask_D = d_D < tl.where(merges, WIDTH, 0)
    lost_D = tl.load(from_key + d_D * PAGE, mask=mask_D, other=0).to(tl.float32)
    if PAIRS > 0:
        by = tl.load(to_position) - tl.load(from_position)
        lost_D = turned(
            from_key, lost_D, d_D, frequency, start, by, mask_D, PAGE, PAIRS, INTERLEAVED
        )
    kept_D = tl.load(to_key + d_D * PAGE, mask=mask_D, other=0).to(tl.float32)
    merged_D = kept_D * own_part + lost_D * part
    tl.store(to_key + d_D * PAGE, merged_D.to(to_key.dtype.element_ty), mask=mask_D)


@triton.jit
def merge_counts(to, source, merges):
    """Adds numbers of tokens, which are stored as logarithms."""
    of_victim = tl.load(source).to(tl.float32)
    of_target = tl.load(to).to(tl.float32)
    total = tl.log(tl.exp(of_victim) + tl.exp(of_target)).to(to.dtype.element_ty)
    tl.store(to, total, mask=merges)


@triton.jit(do_not_specialize=["table_width", "start"])
def merge_kernel(
    key, value, position, mass, slots_of, similarity, table, counts, threshold, frequency,
    table_width, start, own, memory, gain, HEADS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, LARGEST: tl.constexpr, NORMALISED: tl.constexpr,
    TOGETHER: tl.constexpr, KEYS: tl.constexpr, COUNTS: tl.constexpr, HAS_MASS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One sequence: its threshold, its merges, and the last slots into the gaps."""
    sequence = tl.program_id(0).to(tl.int64)
    first, rows = sequence * HEADS, tl.num_programs(0) * HEADS
    after, mean = next_threshold(
        slots_of, similarity, threshold, sequence, rows, memory, gain, HEADS, LARGEST, BLOCK_H
    )
    e_E = tl.arange(0, BLOCK_E)
    for head in range(HEADS):
        row = first + head
        victim, target = tl.load(slots_of + row), tl.load(slots_of + rows + row)
        pages = table + row * table_width
        from_page, from_offset = place_of(pages, victim, PAGE)
        to_page, to_offset = place_of(pages, target, PAGE)
        to, source = to_page * PAGE + to_offset, from_page * PAGE + from_offset
        u = tl.load(similarity + row, mask=target >= 0, other=0)
        judged = u
        if TOGETHER:
            judged = mean
        merges = (target >= 0) & (judged >= after)
        own_part, part = parts_of(u, own, NORMALISED)
        merge_values(value + to * E + e_E, value + source * E + e_E, merges, own_part, part, e_E, E)
        from_key = key + from_page * (D * PAGE) + from_offset
        to_key = key + to_page * (D * PAGE) + to_offset
        if KEYS:
            merge_keys(
                to_key, from_key, position + to, position + source, merges, own_part, part,
                frequency, start, WIDTH, PAGE, PAIRS, INTERLEAVED, BLOCK_D,
            )  # fmt: skip
        if COUNTS:
            merge_counts(to_key + (D - 1) * PAGE, from_key + (D - 1) * PAGE, merges)
        tl.debug_barrier()  # the last slot may be the one that was merged into, by other threads
        if victim >= 0:
            count = tl.load(counts + row).to(tl.int32)
            move_last(
                key, value, position, mass, counts, pages, row, victim, count,
                D, E, PAGE, HAS_MASS, BLOCK_D, BLOCK_E,
            )  # fmt: skip


@triton.jit
def turned(
    from_key, lost_D, d_D, frequency, start, by, mask_D,
    PAGE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
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
