"""Device code of `pack`: steps of keys and of values, then words of codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_towards(x, SIGN: tl.constexpr):
    """The nearest fp16 number that is not below x (SIGN 1) or not above it (SIGN -1)."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    order = tl.where(bits < 0, -(bits & 0x7FFF), bits)
    order += tl.where((half.to(tl.float32) - x) * SIGN < 0, SIGN, 0)
    bits = tl.where(order < 0, (-order) | -0x8000, order)
    moved = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((half.to(tl.float32) - x) * SIGN < 0, moved, half)


@triton.jit
def step_of(low, high, BITS: tl.constexpr):
    """Step and zero of groups, fp16."""
    zero = half_towards(low, -1)
    levels: tl.constexpr = (1 << BITS) - 1
    exact = tl.div_rn(high - zero.to(tl.float32), tl.full(low.shape, levels, tl.float32))
    return half_towards(exact, 1), zero


@triton.jit
def key_steps_kernel(
    key, channels, scales, BITS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    KEPT: tl.constexpr, SCALES: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Steps and zeros of some channels in one group of tokens of a page."""
    page, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t_C = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel_C = tl.load(channels + page * KEPT + t_C, mask=t_C < KEPT, other=0).to(tl.int32)
    low_C = tl.full([BLOCK_T], float("inf"), tl.float32)
    high_C = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for start in range(0, GROUP, 32):
        s_S = group * GROUP + start + tl.arange(0, 32)
        from_SC = (page * SLOTS + s_S)[:, None] * WIDTH + channel_C[None, :]
        x_SC = tl.load(key + from_SC).to(tl.float32)
        low_C = tl.minimum(low_C, tl.min(x_SC, 0))
        high_C = tl.maximum(high_C, tl.max(x_SC, 0))
    step_C, zero_C = step_of(low_C, high_C, BITS)
    to_C = scales + page * PAGE + SCALES + group * 2 * KEPT + t_C
    tl.store(to_C, step_C, mask=t_C < KEPT)
    tl.store(to_C + KEPT, zero_C, mask=t_C < KEPT)


@triton.jit
def value_steps_kernel(
    value, channels, scales, BITS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    KEPT: tl.constexpr, SCALES: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Steps and zeros of some slots in one group of channels of a page."""
    page, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s_S = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    g_G = tl.arange(0, BLOCK_G)
    u_G = group * GROUP + g_G
    real_G = (g_G < GROUP) & (u_G < KEPT)
    channel_G = tl.load(channels + page * KEPT + u_G, mask=real_G, other=0).to(tl.int32)
    from_SG = (page * SLOTS + s_S)[:, None] * WIDTH + channel_G[None, :]
    x_SG = tl.load(value + from_SG, mask=real_G[None, :] & (s_S < SLOTS)[:, None], other=0)
    x_SG = x_SG.to(tl.float32)
    low_S = tl.min(tl.where(real_G[None, :], x_SG, float("inf")), 1)
    high_S = tl.max(tl.where(real_G[None, :], x_SG, float("-inf")), 1)
    step_S, zero_S = step_of(low_S, high_S, BITS)
    to_S = scales + page * PAGE + SCALES + group * SLOTS + s_S
    tl.store(to_S, step_S, mask=s_S < SLOTS)
    tl.store(to_S + GROUPS * SLOTS, zero_S, mask=s_S < SLOTS)


@triton.jit(do_not_specialize=["words"])
def words_kernel(
    numbers, channels, scales, codes, words, BITS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, KEPT: tl.constexpr, SCALES: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, CODES: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Words of a page's codes: one field after the other."""
    page = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    FIELDS: tl.constexpr = 16 // BITS
    word_N = tl.zeros([BLOCK], tl.int32)
    for field in tl.static_range(FIELDS):
        vector_N = n_N // 16 * FIELDS + field
        line_N = vector_N % BLOCKS * 8 + n_N % 16 // 2
        pair_N = vector_N // BLOCKS * 2 + n_N % 2
        if KEYS:
            slot_A, rank_N = line_N, pair_N
            scale_N = slot_A // GROUP * 2 * KEPT + rank_N
        else:
            slot_A, rank_N = pair_N, line_N
            scale_N = rank_N // GROUP * SLOTS + slot_A
        real_N = (n_N < words) & (rank_N < KEPT) & (slot_A < SLOTS)
        channel_N = tl.load(channels + page * KEPT + rank_N, mask=real_N, other=0).to(tl.int32)
        from_A = (page * SLOTS + slot_A) * WIDTH + channel_N
        x_N = tl.load(numbers + from_A, mask=real_N, other=0).to(tl.float32)
        at_N = scales + page * PAGE + SCALES + scale_N
        step_N = tl.load(at_N, mask=real_N, other=1).to(tl.float32)
        at_N += KEPT if KEYS else GROUPS * SLOTS
        zero_N = tl.load(at_N, mask=real_N, other=0).to(tl.float32)
        exact_N = tl.div_rn(x_N - zero_N, tl.where(step_N == 0, 1.0, step_N))
        code_A = (exact_N + 12582912.0) - 12582912.0  # 1.5·2²³ rounds half to even
        code_A = tl.minimum(tl.maximum(code_A, 0.0), (1 << BITS) - 1.0).to(tl.int32)
        word_N += tl.where(real_N, code_A << (field * BITS), 0)
    tl.store(codes + page * PAGE + CODES + n_N, word_N.to(tl.int16), mask=n_N < words)
