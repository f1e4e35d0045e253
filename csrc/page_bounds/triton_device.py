"""Device code of `page_bounds`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.unpack.triton_device import numbers


@triton.jit
def outwards(x, like, SIGN: tl.constexpr, HALF: tl.constexpr):
    """The nearest number of a dtype that is not below x (SIGN 1) or not above it (SIGN -1)."""
    near = x.to(like.dtype.element_ty)
    if HALF:
        bits = near.to(tl.int16, bitcast=True).to(tl.int32)
        order = tl.where(bits < 0, -(bits & 0x7FFF), bits) + SIGN
        bits = tl.where(order < 0, (-order) | -0x8000, order)
        moved = bits.to(tl.int16).to(like.dtype.element_ty, bitcast=True)
        # Compared, not subtracted: of infinite ends the difference is no number.
        short = near.to(tl.float32) < x if SIGN > 0 else near.to(tl.float32) > x
        near = tl.where(short, moved, near)
    return near


@triton.jit
def keys_kernel(
    words, halves, stored, channels, box, length, WIDTH: tl.constexpr, BITS: tl.constexpr,
    SLOTS: tl.constexpr, KEPT: tl.constexpr, BYTES: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
    ITEM: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The box of the keys of a page, and how far its farthest corner is from zero, squared."""
    page = tl.program_id(0).to(tl.int64)
    rank_C, slot_S = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    low_C = tl.full([BLOCK_C], float("inf"), tl.float32)
    high_C = tl.full([BLOCK_C], float("-inf"), tl.float32)
    none_C = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, SLOTS, BLOCK_S):
        real_CS = (rank_C < KEPT)[:, None] & (start + slot_S < SLOTS)[None, :]
        x_CS = numbers(
            words, halves, stored, page, (start + slot_S)[None, :], rank_C[:, None], real_CS,
            BITS, SLOTS, KEPT, BYTES, CODES, SCALES, GROUP, GROUPS, BLOCKS, ITEM, True,
        )  # fmt: skip
        none_C = tl.maximum(none_C, tl.max((real_CS & (x_CS != x_CS)).to(tl.int32), 1))
        known_CS = real_CS & (x_CS == x_CS)
        low_C = tl.minimum(low_C, tl.min(tl.where(known_CS, x_CS, float("inf")), 1))
        high_C = tl.maximum(high_C, tl.max(tl.where(known_CS, x_CS, float("-inf")), 1))
    low_C = outwards(tl.where(none_C > 0, float("nan"), low_C), box, -1, HALF)
    high_C = outwards(tl.where(none_C > 0, float("nan"), high_C), box, 1, HALF)
    channel_C = tl.load(channels + page * KEPT + rank_C, mask=rank_C < KEPT, other=0).to(tl.int32)
    to_C = box + page * 2 * WIDTH + channel_C
    tl.store(to_C, low_C, mask=rank_C < KEPT)
    tl.store(to_C + WIDTH, high_C, mask=rank_C < KEPT)
    x_C, y_C = tl.abs(low_C.to(tl.float32)), tl.abs(high_C.to(tl.float32))
    far_C = tl.where(rank_C < KEPT, tl.where(x_C < y_C, y_C, x_C), 0.0)
    tl.store(length + page * 2, tl.sum(far_C * far_C, 0))


@triton.jit
def values_kernel(
    words, halves, stored, length, BITS: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr,
    BYTES: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCKS: tl.constexpr, ITEM: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The squared length of the longest value of a page."""
    page = tl.program_id(0).to(tl.int64)
    rank_C, slot_S = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    longest_S = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, SLOTS, BLOCK_S):
        real_SC = (start + slot_S < SLOTS)[:, None] & (rank_C < KEPT)[None, :]
        x_SC = numbers(
            words, halves, stored, page, (start + slot_S)[:, None], rank_C[None, :], real_SC,
            BITS, SLOTS, KEPT, BYTES, CODES, SCALES, GROUP, GROUPS, BLOCKS, ITEM, False,
        )  # fmt: skip
        x_SC = tl.where(real_SC, x_SC, 0.0)
        square_S = tl.sum(x_SC * x_SC, 1)
        # What is no number stays the largest.
        longest_S = tl.where(square_S <= longest_S, longest_S, square_S + (longest_S - longest_S))
    none = tl.max((longest_S != longest_S).to(tl.int32), 0)
    longest = tl.max(tl.where(longest_S == longest_S, longest_S, 0.0), 0)
    tl.store(length + page * 2 + 1, tl.where(none > 0, float("nan"), longest))


@triton.jit(do_not_specialize=["size"])
def cells_kernel(
    words, halves, stored, ranks, box, cell, size, CELL_BITS: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, BYTES: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr, ITEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bytes of the cells of a page: one field after the other. ranks: of channels; −1: dropped."""
    page = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    FIELDS: tl.constexpr = 8 // CELL_BITS
    QUADS: tl.constexpr = (WIDTH + 3) // 4
    unit_N = n_N // 32
    channel_N = unit_N % QUADS * 4 + n_N % 4
    byte_N = tl.zeros([BLOCK], tl.int32)
    for field in tl.static_range(FIELDS):
        slot_N = (unit_N // QUADS * FIELDS + field) * 8 + n_N % 32 // 4
        real_N = (n_N < size) & (channel_N < WIDTH)
        rank_N = tl.load(ranks + page * WIDTH + channel_N, mask=real_N, other=-1).to(tl.int32)
        real_N = real_N & (rank_N >= 0)
        x_N = numbers(
            words, halves, stored, page, slot_N, rank_N, real_N, BITS, SLOTS, KEPT, BYTES, CODES,
            SCALES, GROUP, GROUPS, BLOCKS, ITEM, True,
        )  # fmt: skip
        from_N = box + page * 2 * WIDTH + channel_N
        low_N = tl.load(from_N, mask=real_N, other=0).to(tl.float32)
        high_N = tl.load(from_N + WIDTH, mask=real_N, other=1).to(tl.float32)
        parts = tl.full([BLOCK], 1 << CELL_BITS, tl.float32)
        per_N = tl.div_rn(parts, high_N - low_N)
        at_N = (x_N - low_N) * per_N
        at_N = tl.where((at_N >= 1) & (per_N < float("inf")), at_N, 0.0)  # none: the first cell
        code_N = tl.minimum(at_N, (1 << CELL_BITS) - 1.0).to(tl.int32)
        byte_N += tl.where(real_N, code_N << (field * CELL_BITS), 0)
    tl.store(cell + page * size + n_N, byte_N.to(tl.uint8), mask=n_N < size)
