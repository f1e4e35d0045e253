"""Triton kernels of `pack`: steps of groups first, then words of codes, each by its own program."""

from __future__ import annotations

from typing import Any

import torch
import triton
from kvpress.csrc.pack import Operands
from kvpress.csrc.pack.reference import check
from kvpress.csrc.pack.triton_device import key_steps_kernel, value_steps_kernel, words_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.formulas.page_layout import LINES, PageLayout

BLOCK = 256  # words of a program


def pack(operands: Operands) -> Tensor:
    """Pages uint8 `[P, bytes]`, the same as the reference, bit by bit. Raises OperatorError."""
    key_PSD, value_PSE, channel_PC, channel_PU, _ = operands
    sizes = check(operands)
    page_PX = key_PSD.new_zeros((len(key_PSD), sizes.page_bytes), dtype=torch.uint8)
    if not len(key_PSD):
        return page_PX
    key_scales, value_codes, value_scales, _ = sizes.offsets
    with device_of(key_PSD):
        if sizes.key_bits == 16:
            put(page_PX, 0, kept(key_PSD, channel_PC).mT)
        else:
            _keys(page_PX, key_PSD, channel_PC, sizes, key_scales)
        if sizes.value_bits == 16:
            put(page_PX, value_codes, kept(value_PSE, channel_PU))
        else:
            _values(page_PX, value_PSE, channel_PU, sizes, (value_codes, value_scales))
    return page_PX


def kept(x_PSD: Tensor, channel_PC: Tensor) -> Tensor:
    """The kept channels of pages."""
    return x_PSD.gather(2, channel_PC.long()[:, None].expand(-1, x_PSD.shape[1], -1))


def put(page_PX: Tensor, offset: int, numbers: Tensor) -> None:
    """Writes numbers of every page as they are."""
    data_PX = numbers.contiguous().flatten(1).view(torch.uint8)
    page_PX[:, offset : offset + data_PX.shape[1]] = data_PX


def _keys(
    page_PX: Tensor, key_PSD: Tensor, channel_PC: Tensor, sizes: PageLayout, scales: int
) -> None:
    groups = sizes.slots // sizes.key_group
    common = _common(page_PX, key_PSD, sizes.key_bits, sizes.key_kept, sizes.key_group, scales)
    operands = (key_PSD, channel_PC, page_PX.view(torch.float16))
    grid = (len(page_PX), groups, triton.cdiv(sizes.key_kept, 16))
    key_steps_kernel[grid](*operands, **common, BLOCK_T=16)
    places = {"CODES": 0, "BLOCKS": sizes.slots // LINES, "GROUPS": groups, "KEYS": True}
    _words(page_PX, operands, scales // 2, {**common, **places})


def _values(
    page_PX: Tensor,
    value_PSE: Tensor,
    channel_PU: Tensor,
    sizes: PageLayout,
    offsets: tuple[int, int],
) -> None:
    codes, scales = offsets
    kept, group, groups = sizes.value_kept, sizes.value_group, sizes.value_groups
    common = _common(page_PX, value_PSE, sizes.value_bits, kept, group, scales)
    operands = (value_PSE, channel_PU, page_PX.view(torch.float16))
    blocks = {"BLOCK_S": 16, "BLOCK_G": triton.next_power_of_2(group)}
    grid = (len(page_PX), groups, sizes.slots // 16)
    value_steps_kernel[grid](*operands, **common, GROUPS=groups, **blocks)
    vectors = triton.cdiv(kept, LINES)
    places = {"CODES": codes // 2, "BLOCKS": vectors, "GROUPS": groups, "KEYS": False}
    _words(page_PX, operands, (scales - codes) // 2, {**common, **places})


def _common(
    page_PX: Tensor, numbers: Tensor, bits: int, kept: int, group: int, scales: int
) -> dict[str, Any]:
    """What steps and words are launched with. Places count numbers of two bytes."""
    sizes = {"BITS": bits, "SLOTS": numbers.shape[1], "WIDTH": numbers.shape[2], "KEPT": kept}
    places = {"SCALES": scales // 2, "PAGE": page_PX.shape[1] // 2, "GROUP": group}
    return {**sizes, **places, "num_warps": 4, **FUSED}


def _words(
    page_PX: Tensor, operands: tuple[Tensor, ...], words: int, options: dict[str, Any]
) -> None:
    grid = (len(page_PX), triton.cdiv(words, BLOCK))
    words_kernel[grid](*operands, page_PX.view(torch.int16), words, **options, BLOCK=BLOCK)
