"""Triton kernels of `decode_step`: append, attend as `decode_rows` does, observe and evict.

Nothing is read back: which slot goes is found and overwritten on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from kvpress.csrc.decode_rows.triton_kernel import attend
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.decode_step.reference import check, check_choices, refuse_old
from kvpress.csrc.triton_common import (
    FRESH,
    FUSED,
    NOISES,
    device_of,
    finite,
    gumbel,
    noise_row,
    noise_stream,
)
from torch import Tensor

from kvpress.ops.shapes import ages

MASS = tl.constexpr(RANKS.index("mass"))
MASS_PER_AGE = tl.constexpr(RANKS.index("mass_per_age"))
LOGITS = 2048  # per block of `finish_kernel`


def decode_step(
    query_BN1D: Tensor,
    key_BH1D: Tensor,
    value_BH1E: Tensor,
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
    evict: bool,
    rank: str,
    noise: str,
    tau: float,
    seed: int,
    layer: int,
    scaling: float,
    softcap: float,
    old: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> Tensor:
    """Output `[B, N, 1, E]`; changes the pools and `counts_R` in place.

    The same as the reference, in three or four launches. Raises OperatorError.
    """
    refuse_old(old)
    new, pools = (query_BN1D, key_BH1D, value_BH1E), (key_PDS, value_PSE, position_PS, mass_PS)
    check(*new, *pools, table_RW, counts_R, seen_B, quota_R, recent_B)
    check_choices(rank, noise, tau, scaling, softcap, evict and mass_PS is None)
    ages("decode_step", seen_B, recent_B, sink, 1)
    append(key_BH1D, value_BH1E, *pools, table_RW, counts_R, seen_B)
    logits = None
    if mass_PS is not None:
        slots = table_RW.shape[1] * key_PDS.shape[2]
        shape = (*query_BN1D.shape[:3], slots)
        logits = torch.empty(shape, dtype=torch.float32, device=query_BN1D.device)
    attended = (key_PDS, value_PSE, table_RW, counts_R, scaling, softcap, logits)
    out_BN1E, lse_BN1 = attend(query_BN1D, *attended)
    if logits is None and not evict:
        return out_BN1E
    rows, heads = table_RW.shape[0], key_BH1D.shape[1]
    group = lse_BN1.numel() // rows
    block_g = triton.next_power_of_2(group)
    width, value_width = key_PDS.shape[1], value_PSE.shape[2]
    with device_of(query_BN1D):
        finish_kernel[(rows,)](
            *(key_PDS, value_PSE, position_PS, position_PS if mass_PS is None else mass_PS),
            *(lse_BN1 if logits is None else logits, lse_BN1, table_RW, counts_R, seen_B),
            *(quota_R, recent_B, sink, 1.0 / tau, noise_stream(seed, layer), table_RW.shape[1]),
            HEADS=heads,
            GROUP=group,
            D=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            OBSERVES=logits is not None,
            NOISE=NOISES[noise],
            PLAIN=noise == "none" and tau == 1.0,
            EVICTS=evict,
            RANK=RANKS.index(rank),
            BLOCK_G=block_g,
            BLOCK_S=max(64, LOGITS // block_g),
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=8,
            **FUSED,
        )
    return out_BN1E


def append(
    key_BH1D: Tensor,
    value_BH1E: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
) -> None:
    """Writes the new token behind the others of its row and counts it."""
    width, value_width = key_PDS.shape[1], value_PSE.shape[2]
    with device_of(key_BH1D):
        append_kernel[(len(counts_R),)](
            *(key_BH1D, value_BH1E, key_PDS, value_PSE, position_PS),
            *(position_PS if mass_PS is None else mass_PS, table_RW, counts_R, seen_B),
            *(key_BH1D.stride(0), key_BH1D.stride(1), key_BH1D.stride(3)),
            *(value_BH1E.stride(0), value_BH1E.stride(1), value_BH1E.stride(3)),
            table_RW.shape[1],
            HEADS=key_BH1D.shape[1],
            D=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            KEEPS_MASS=mass_PS is not None,
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=2,
            **FUSED,
        )


@triton.jit(do_not_specialize=["table_width"])
def append_kernel(
    new_key,
    new_value,
    key,
    value,
    position,
    mass,
    table,
    counts,
    seen,
    key_batch,
    key_head,
    key_width,
    value_batch,
    value_head,
    value_width,
    table_width,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    KEEPS_MASS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    page = tl.load(table + row * table_width + count // PAGE).to(tl.int64)
    offset = count % PAGE
    d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    from_key = row // HEADS * key_batch + row % HEADS * key_head
    new_D = tl.load(new_key + from_key + d_D * key_width, mask=d_D < D)
    to_D = key + (page * D + d_D) * PAGE + offset
    tl.store(to_D, new_D.to(key.dtype.element_ty), mask=d_D < D)
    from_value = row // HEADS * value_batch + row % HEADS * value_head
    new_E = tl.load(new_value + from_value + e_E * value_width, mask=e_E < E)
    to_E = value + (page * PAGE + offset) * E + e_E
    tl.store(to_E, new_E.to(value.dtype.element_ty), mask=e_E < E)
    own = tl.load(seen + row // HEADS) - 1
    tl.store(position + page * PAGE + offset, own.to(tl.int32))
    if KEEPS_MASS:
        tl.store(mass + page * PAGE + offset, 0.0)
    tl.store(counts + row, count + 1)


@triton.jit
def noisy(
    logits,
    row,
    s_S,
    count,
    slots,
    noise_G,
    position_S,
    coldness,
    GROUP: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The logits of a row's group with noise and temperature, -inf for what is not there."""
    g_G = tl.arange(0, BLOCK_G)
    y_GS = tl.load(
        logits + (row * GROUP + g_G)[:, None] * slots + s_S[None, :],
        mask=(g_G < GROUP)[:, None] & (s_S < count)[None, :],
        other=float("-inf"),
    )
    if NOISE != 0:
        y_GS += gumbel(noise_G[:, None], position_S[None, :])
    return y_GS * coldness


@triton.jit
def rank_of(mass_S, position_S, now, RANK: tl.constexpr):
    """What slots are ranked by."""
    score_S = position_S.to(tl.float32)
    if RANK == MASS:
        score_S = mass_S
    if RANK == MASS_PER_AGE:
        age_S = tl.maximum(now - position_S, 1)
        score_S = tl.div_rn(mass_S, age_S.to(tl.float32))
    return score_S


@triton.jit
def consider(lowest_S, latest_S, victim_S, score_S, position_S, s_S, open_S):
    """The lowest open slot that every lane has met; of equal ones the latest."""
    score_S = tl.where(score_S != score_S, float("-inf"), score_S)
    tied_S = (score_S == lowest_S) & (position_S > latest_S)
    worse_S = open_S & ((score_S < lowest_S) | tied_S)
    lowest_S = tl.where(worse_S, score_S, lowest_S)
    latest_S = tl.where(worse_S, position_S, latest_S)
    return lowest_S, latest_S, tl.where(worse_S, s_S, victim_S)


@triton.jit
def worst(lowest_S, latest_S, victim_S):
    """The position and the slot of the lowest of all lanes; the position is -1 if there is none."""
    lowest = tl.min(tl.where(latest_S >= 0, lowest_S, float("inf")), 0)
    latest = tl.max(tl.where(lowest_S == lowest, latest_S, -1), 0)
    # Positions differ within a row, so that one lane is left.
    victim = tl.max(tl.where((latest_S == latest) & (lowest_S == lowest), victim_S, 0), 0)
    return latest, victim


@triton.jit(do_not_specialize=["sink", "stream", "table_width"])
def finish_kernel(
    key,
    value,
    position,
    mass,
    logits,
    lse,
    table,
    counts,
    seen,
    quota,
    recent,
    sink,
    coldness,
    stream,
    table_width,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    OBSERVES: tl.constexpr,
    NOISE: tl.constexpr,
    PLAIN: tl.constexpr,
    EVICTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One row: what the token attended to is added to the mass; the slot that ranks lowest goes."""
    row = tl.program_id(0).to(tl.int64)
    count, slots = tl.load(counts + row).to(tl.int32), table_width * PAGE
    now = tl.load(seen + row // HEADS).to(tl.int32)
    open_to = tl.maximum(now - tl.load(recent + row // HEADS), 0)
    over = count > tl.load(quota + row)
    table += row * table_width
    g_G = tl.arange(0, BLOCK_G)
    query = -1
    if NOISE == FRESH:
        query = now - 1
    noise_G = noise_row(stream, row % HEADS * GROUP + g_G, query + tl.zeros_like(g_G))

    norm_G = tl.zeros([BLOCK_G], tl.float32)
    if OBSERVES:
        if PLAIN:
            norm_G = tl.load(lse + row * GROUP + g_G, mask=g_G < GROUP, other=0)
        else:
            top_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
            total_G = tl.zeros([BLOCK_G], tl.float32)
            for start in range(0, count, BLOCK_S):
                s_S = start + tl.arange(0, BLOCK_S)
                page_S = tl.load(table + s_S // PAGE, mask=s_S < count, other=0).to(tl.int64)
                address_S = page_S * PAGE + s_S % PAGE
                position_S = tl.load(position + address_S, mask=s_S < count, other=0)
                y_GS = noisy(
                    logits,
                    row,
                    s_S,
                    count,
                    slots,
                    noise_G,
                    position_S,
                    coldness,
                    GROUP,
                    NOISE,
                    BLOCK_G,
                )
                new_G = tl.maximum(top_G, tl.max(y_GS, 1))
                weights_GS = tl.exp(y_GS - finite(new_G)[:, None])
                total_G = total_G * tl.exp(top_G - finite(new_G)) + tl.sum(weights_GS, 1)
                top_G = new_G
            norm_G = finite(top_G) + tl.log(tl.where(total_G == 0, 1.0, total_G))

    lowest_S = tl.full([BLOCK_S], float("inf"), tl.float32)
    latest_S = tl.full([BLOCK_S], -1, tl.int32)
    victim_S = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        page_S = tl.load(table + s_S // PAGE, mask=s_S < count, other=0).to(tl.int64)
        address_S = page_S * PAGE + s_S % PAGE
        position_S = tl.load(position + address_S, mask=s_S < count, other=-1)
        score_S = position_S.to(tl.float32)
        if OBSERVES:
            y_GS = noisy(
                logits,
                row,
                s_S,
                count,
                slots,
                noise_G,
                position_S,
                coldness,
                GROUP,
                NOISE,
                BLOCK_G,
            )
            mass_S = tl.load(mass + address_S, mask=s_S < count, other=0)
            mass_S += tl.sum(tl.exp(y_GS - norm_G[:, None]), 0)
            tl.store(mass + address_S, mass_S, mask=s_S < count)
            score_S = rank_of(mass_S, position_S, now, RANK)
        if EVICTS:
            open_S = (s_S < count) & (position_S >= sink) & (position_S < open_to)
            lowest_S, latest_S, victim_S = consider(
                lowest_S, latest_S, victim_S, score_S, position_S, s_S, open_S
            )
    if EVICTS:
        latest, victim = worst(lowest_S, latest_S, victim_S)
        if over & (latest >= 0):
            tl.debug_barrier()  # the masses written above are moved below, by other threads
            to_page = tl.load(table + victim // PAGE).to(tl.int64)
            from_page = tl.load(table + (count - 1) // PAGE).to(tl.int64)
            to, source = victim % PAGE, (count - 1) % PAGE
            d_D, e_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
            key_D = tl.load(key + (from_page * D + d_D) * PAGE + source, mask=d_D < D)
            tl.store(key + (to_page * D + d_D) * PAGE + to, key_D, mask=d_D < D)
            value_E = tl.load(value + (from_page * PAGE + source) * E + e_E, mask=e_E < E)
            tl.store(value + (to_page * PAGE + to) * E + e_E, value_E, mask=e_E < E)
            moved = tl.load(position + from_page * PAGE + source)
            tl.store(position + to_page * PAGE + to, moved)
            if OBSERVES:
                carried = tl.load(mass + from_page * PAGE + source)
                tl.store(mass + to_page * PAGE + to, carried)
            tl.store(counts + row, (count - 1).to(tl.int64))
