"""Triton kernel of `unpack`: one program per block of numbers of a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kvpress.csrc.triton_common import FUSED, device_of
from kvpress.csrc.unpack.reference import check
from torch import Tensor

from kvpress.formulas.page_layout import LINES

BLOCK = 512  # numbers of a program


def unpack(
    page_PX: Tensor, channel_PT: Tensor, channel_PU: Tensor, layout: list[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys `[P, S, D]` and values `[P, S, E]`, the same as the reference. Raises OperatorError."""
    sizes = check(page_PX, channel_PT, channel_PU, layout, like)
    pages, slots = len(page_PX), sizes.slots
    key_scales, value_codes, value_scales, _ = sizes.offsets
    key = like.new_zeros(pages, slots, sizes.key_width)
    value = like.new_zeros(pages, slots, sizes.value_width)
    views = page_PX.view(torch.int16), page_PX.view(torch.float16), page_PX.view(like.dtype)
    if not pages:
        return key, value
    keys = {"BITS": sizes.key_bits, "WIDTH": sizes.key_width, "KEPT": sizes.key_kept}
    keys |= {"CODES": 0, "SCALES": key_scales // 2, "GROUP": sizes.key_group}
    keys |= {"GROUPS": slots // sizes.key_group, "BLOCKS": slots // LINES, "KEYS": True}
    values = {"BITS": sizes.value_bits, "WIDTH": sizes.value_width, "KEPT": sizes.value_kept}
    values |= {"CODES": value_codes // 2, "SCALES": value_scales // 2, "GROUP": sizes.value_group}
    values |= {"GROUPS": sizes.value_groups, "BLOCKS": triton.cdiv(sizes.value_kept, LINES)}
    values |= {"KEYS": False}
    common = {"SLOTS": slots, "BYTES": sizes.page_bytes, "ITEM": sizes.item_bytes, "BLOCK": BLOCK}
    with device_of(page_PX):
        for channels, out, places in ((channel_PT, key, keys), (channel_PU, value, values)):
            grid = (pages, triton.cdiv(slots * places["KEPT"], BLOCK))
            options = {**common, **places, "num_warps": 4, **FUSED}
            unpack_kernel[grid](*views, channels, out, **options)
    return key, value


@triton.jit
def numbers(
    words,
    halves,
    stored,
    page,
    slot,
    rank,
    mask,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
    BYTES: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ITEM: tl.constexpr,
    KEYS: tl.constexpr,
):
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
    words,
    halves,
    stored,
    channels,
    out,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    BYTES: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ITEM: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some numbers of a page, to the channels that they belong to."""
    page = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot_N, rank_N, real_N = n_N // KEPT, n_N % KEPT, n_N < SLOTS * KEPT
    x_N = numbers(
        words,
        halves,
        stored,
        page,
        slot_N,
        rank_N,
        real_N,
        BITS,
        SLOTS,
        KEPT,
        BYTES,
        CODES,
        SCALES,
        GROUP,
        GROUPS,
        BLOCKS,
        ITEM,
        KEYS,
    )
    channel_N = tl.load(channels + page * KEPT + rank_N, mask=real_N, other=0).to(tl.int32)
    to_N = out + (page * SLOTS + slot_N) * WIDTH + channel_N
    tl.store(to_N, x_N.to(out.dtype.element_ty), mask=real_N)
