"""Device code of `decode_step`: the new token, what it attended to, and the slot that goes."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.triton_common import FRESH, address_of, finite, gumbel, noise_row

MASS = tl.constexpr(RANKS.index("mass"))
MASS_PER_AGE = tl.constexpr(RANKS.index("mass_per_age"))


@triton.jit(do_not_specialize=["table_width"])
def append_kernel(
    new_key, new_value, key, value, position, mass, table, counts, seen,
    key_batch, key_head, key_width, value_batch, value_head, value_width, table_width,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    KEEPS_MASS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
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
    logits, row, s_S, count, slots, noise_G, position_S, coldness,
    GROUP: tl.constexpr, NOISE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
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
def add_mass(at_S, y_GS, norm_G, held_S):
    """Adds the weights of a row's group to the masses of slots. Returns these."""
    mass_S = tl.load(at_S, mask=held_S, other=0)
    mass_S += tl.sum(tl.exp(y_GS - norm_G[:, None]), 0)
    tl.store(at_S, mass_S, mask=held_S)
    return mass_S


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


@triton.jit
def noisy_lse(
    logits, row, table, position, count, slots, noise_G, coldness, PAGE: tl.constexpr,
    GROUP: tl.constexpr, NOISE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """LSE of a row's group with noise and temperature."""
    top_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total_G = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        at_S = position + address_of(table, s_S, count, PAGE)
        position_S = tl.load(at_S, mask=s_S < count, other=0)
        y_GS = noisy(
            logits, row, s_S, count, slots, noise_G, position_S, coldness, GROUP, NOISE, BLOCK_G
        )
        new_G = tl.maximum(top_G, tl.max(y_GS, 1))
        weights_GS = tl.exp(y_GS - finite(new_G)[:, None])
        total_G = total_G * tl.exp(top_G - finite(new_G)) + tl.sum(weights_GS, 1)
        top_G = new_G
    return finite(top_G) + tl.log(tl.where(total_G == 0, 1.0, total_G))


@triton.jit
def noise_of(stream, row, now, HEADS: tl.constexpr, NOISE: tl.constexpr, g_G, GROUP: tl.constexpr):
    """Where the noise of a row's group starts for the newest token."""
    query = -1
    if NOISE == FRESH:
        query = now - 1
    return noise_row(stream, row % HEADS * GROUP + g_G, query + tl.zeros_like(g_G))


@triton.jit
def no_victim(BLOCK_S: tl.constexpr):
    """What `consider` starts with in every lane: the lowest score, its position and its slot."""
    lowest_S = tl.full([BLOCK_S], float("inf"), tl.float32)
    return lowest_S, tl.full([BLOCK_S], -1, tl.int32), tl.zeros([BLOCK_S], tl.int32)


@triton.jit
def move_last(
    key, value, position, mass, counts, table, row, victim, count, D: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, HAS_MASS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The last slot of a row takes the place of another. `table`: the row's own."""
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
    if HAS_MASS:
        carried = tl.load(mass + from_page * PAGE + source)
        tl.store(mass + to_page * PAGE + to, carried)
    tl.store(counts + row, (count - 1).to(tl.int64))


@triton.jit(do_not_specialize=["stream", "table_width"])
def finish_kernel(
    key, value, position, mass, logits, lse, table, counts, seen, quota, recent, sinks,
    coldness, stream, table_width, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, PAGE: tl.constexpr, OBSERVES: tl.constexpr, NOISE: tl.constexpr,
    PLAIN: tl.constexpr, EVICTS: tl.constexpr, RANK: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One row: what the token attended to is added to the mass; the slot that ranks lowest goes."""
    row = tl.program_id(0).to(tl.int64)
    count, slots = tl.load(counts + row).to(tl.int32), table_width * PAGE
    now = tl.load(seen + row // HEADS).to(tl.int32)
    open_to, sink = tl.maximum(now - tl.load(recent + row), 0), tl.load(sinks + row // HEADS)
    table += row * table_width
    g_G = tl.arange(0, BLOCK_G)
    noise_G = noise_of(stream, row, now, HEADS, NOISE, g_G, GROUP)
    norm_G = tl.zeros([BLOCK_G], tl.float32)
    if OBSERVES and PLAIN:
        norm_G = tl.load(lse + row * GROUP + g_G, mask=g_G < GROUP, other=0)
    elif OBSERVES:
        norm_G = noisy_lse(
            logits, row, table, position, count, slots, noise_G, coldness,
            PAGE, GROUP, NOISE, BLOCK_G, BLOCK_S,
        )  # fmt: skip
    lowest_S, latest_S, victim_S = no_victim(BLOCK_S)
    for start in range(0, count, BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        address_S = address_of(table, s_S, count, PAGE)
        position_S = tl.load(position + address_S, mask=s_S < count, other=-1)
        score_S = position_S.to(tl.float32)
        if OBSERVES:
            y_GS = noisy(
                logits, row, s_S, count, slots, noise_G, position_S, coldness, GROUP, NOISE, BLOCK_G
            )
            mass_S = add_mass(mass + address_S, y_GS, norm_G, s_S < count)
            score_S = rank_of(mass_S, position_S, now, RANK)
        if EVICTS:
            open_S = (s_S < count) & (position_S >= sink) & (position_S < open_to)
            lowest_S, latest_S, victim_S = consider(
                lowest_S, latest_S, victim_S, score_S, position_S, s_S, open_S
            )
    if EVICTS:
        latest, victim = worst(lowest_S, latest_S, victim_S)
        if (count > tl.load(quota + row)) & (latest >= 0):
            tl.debug_barrier()  # the masses written above are moved below, by other threads
            move_last(
                key, value, position, mass, counts, table, row, victim, count,
                D, E, PAGE, OBSERVES, BLOCK_D, BLOCK_E,
            )  # fmt: skip
