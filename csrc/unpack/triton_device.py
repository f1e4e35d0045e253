"""Device code of `unpack`: the numbers of a page of old slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers(
    words, halves, stored, page, slot, rank, mask,
    BITS: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, BYTES: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr, ITEM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Numbers of a page in fp32, by slots and ranks of kept channels (any shapes that broadcast).

    words, halves, stored: the pages as int16, fp16 and in the store's dtype.
    """
    if BITS == 16:
        place = rank * SLOTS + slot if KEYS else slot * KEPT + rank
        at = stored + page * (BYTES // ITEM) + CODES * 2 // ITEM + place
        return tl.load(at, mask=mask, other=0).to(tl.float32)
    FIELDS: tl.constexpr = 16 // BITS
    line, pair = (slot, rank) if KEYS else (rank, slot)
    vector = pair // 2 * BLOCKS + line // 8
    at = words + page * (BYTES // 2) + CODES + vector // FIELDS * 16 + line % 8 * 2 + pair % 2
    word = tl.load(at, mask=mask, other=0).to(tl.int32) & 0xFFFF
    code = (word >> (vector % FIELDS * BITS)) & ((1 << BITS) - 1)
    scale = slot // GROUP * 2 * KEPT + rank if KEYS else rank // GROUP * SLOTS + slot
    at = halves + page * (BYTES // 2) + SCALES + scale
    step = tl.load(at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(at + (KEPT if KEYS else GROUPS * SLOTS), mask=mask, other=0).to(tl.float32)
    return code.to(tl.float32) * step + zero


@triton.jit
def unpack_kernel(
    words, halves, stored, channels, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr, BYTES: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr, ITEM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some numbers of a page, to the channels that they belong to."""
    page = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot_A, rank_N, real_N = n_N // KEPT, n_N % KEPT, n_N < SLOTS * KEPT
    x_N = numbers(
        words, halves, stored, page, slot_A, rank_N, real_N, BITS, SLOTS, KEPT, BYTES,
        CODES, SCALES, GROUP, GROUPS, BLOCKS, ITEM, KEYS,
    )  # fmt: skip
    channel_N = tl.load(channels + page * KEPT + rank_N, mask=real_N, other=0).to(tl.int32)
    to_A = out + (page * SLOTS + slot_A) * WIDTH + channel_N
    tl.store(to_A, x_N.to(out.dtype.element_ty), mask=real_N)
