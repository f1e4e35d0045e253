"""Triton kernel of `unpack`: one program per block of numbers of a page."""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.triton_common import FUSED, device_of
from kvpress.csrc.unpack import Operands
from kvpress.csrc.unpack.reference import check
from kvpress.csrc.unpack.reference import unpack as reference
from kvpress.csrc.unpack.triton_device import unpack_kernel
from torch import Tensor

from kvpress.formulas.page_layout import LINES

BLOCK = 512  # numbers of a program


def unpack(operands: Operands) -> tuple[Tensor, Tensor]:
    """Keys `[P, S, D]` and values `[P, S, E]`, the same as the reference. Raises OperatorError."""
    page_PX, channel_PC, channel_PU, _, like = operands
    sizes = check(operands)
    if sizes.boosted:  # two programs would add to one number
        return reference(operands)
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
        for channels, out, places in ((channel_PC, key, keys), (channel_PU, value, values)):
            grid = (pages, triton.cdiv(slots * places["KEPT"], BLOCK))
            options = {**common, **places, "num_warps": 4, **FUSED}
            unpack_kernel[grid](*views, channels, out, **options)
    return key, value
