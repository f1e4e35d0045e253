"""Triton kernels of `page_bounds`: programs for the keys, the values and the cells of a page."""

from __future__ import annotations

from typing import Any

import torch
import triton
from kvpress.csrc.page_bounds import Operands
from kvpress.csrc.page_bounds.reference import SLACK, check
from kvpress.csrc.page_bounds.triton_device import cells_kernel, keys_kernel, values_kernel
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.formulas.page_cells import cell_bytes
from kvpress.formulas.page_layout import LINES, PageLayout

BLOCK = 4096  # numbers that a program holds at once
BYTES = 256  # of cells that a program writes


def page_bounds(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the reference; boxes and cells bit by bit. Raises OperatorError."""
    page_PX, channel_PC, _, _, like, bits = operands
    sizes = check(operands)
    pages, slots = len(page_PX), sizes.slots
    cell_PY = page_PX.new_empty(pages, cell_bytes(sizes.key_width, slots, bits))
    box_P2D = like.new_zeros(pages, 2, sizes.key_width)
    length_P2 = like.new_empty(pages, 2, dtype=torch.float32)
    if not pages:
        return box_P2D, length_P2, cell_PY
    key_scales, value_codes, value_scales, _ = sizes.offsets
    views = page_PX.view(torch.int16), page_PX.view(torch.float16), page_PX.view(like.dtype)
    keys = {"BITS": sizes.key_bits, "KEPT": sizes.key_kept, "CODES": 0, "SCALES": key_scales // 2}
    keys |= {"GROUP": sizes.key_group, "GROUPS": slots // sizes.key_group, "BLOCKS": slots // LINES}
    keys |= {"WIDTH": sizes.key_width, "HALF": like.element_size() == 2}
    values = {"BITS": sizes.value_bits, "KEPT": sizes.value_kept, "CODES": value_codes // 2}
    values |= {"SCALES": value_scales // 2, "GROUP": sizes.value_group}
    values |= {"GROUPS": sizes.value_groups, "BLOCKS": triton.cdiv(sizes.value_kept, LINES)}
    with device_of(page_PX):
        keys_kernel[(pages,)](*views, channel_PC, box_P2D, length_P2, **_common(sizes, keys))
        values_kernel[(pages,)](*views, length_P2, **_common(sizes, values))
        if bits:
            _cells(views, channel_PC, box_P2D, cell_PY, {**_common(sizes, keys), "CELL_BITS": bits})
    return box_P2D, length_P2.sqrt_().mul_(SLACK), cell_PY


def _cells(
    views: tuple[Tensor, ...],
    channel_PC: Tensor,
    box_P2D: Tensor,
    cell_PY: Tensor,
    options: dict[str, Any],
) -> None:
    """The cells of all keys, a program for some bytes of a page."""
    pages, kept = channel_PC.shape
    rank_PC = torch.arange(kept, dtype=torch.int16, device=box_P2D.device).expand(pages, -1)
    rank_PD = rank_PC.new_full((pages, box_P2D.shape[2]), -1)
    rank_PD = rank_PD.scatter_(1, channel_PC.long(), rank_PC)
    for own in ("HALF", "BLOCK_C", "BLOCK_S"):
        del options[own]
    size = cell_PY.shape[1]
    operands = (*views, rank_PD, box_P2D, cell_PY, size)
    cells_kernel[(pages, triton.cdiv(size, BYTES))](*operands, **options, BLOCK=BYTES)


def _common(sizes: PageLayout, own: dict[str, Any]) -> dict[str, Any]:
    """What both kernels are launched with: as many slots at once as a program has room for."""
    kept = max(16, triton.next_power_of_2(own["KEPT"]))
    slots = max(16, min(triton.next_power_of_2(sizes.slots), BLOCK // kept))
    common = {"SLOTS": sizes.slots, "BYTES": sizes.page_bytes, "ITEM": sizes.item_bytes}
    return {**common, **own, "BLOCK_C": kept, "BLOCK_S": slots, "num_warps": 4, **FUSED}
