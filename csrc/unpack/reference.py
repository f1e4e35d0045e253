"""PyTorch reference of `unpack`."""

from __future__ import annotations

import torch
from kvpress.csrc.pack.reference import check_channels
from kvpress.csrc.unpack import Operands
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout, checked, from_bytes
from kvpress.ops import shapes


def unpack(operands: Operands) -> tuple[Tensor, Tensor]:
    """Keys `[P, S, D]` and values `[P, S, E]` in the dtype of `like`, that of the store.

    Dropped channels are zero. Raises OperatorError.
    """
    page_PX, channel_PC, channel_PU, _, like = operands
    sizes = check(operands)
    key_PSD, value_PSE = numbers(page_PX, channel_PC, channel_PU, sizes, like.dtype)
    return key_PSD.to(like.dtype), value_PSE.to(like.dtype)


def numbers(
    page_PX: Tensor, channel_PC: Tensor, channel_PU: Tensor, sizes: PageLayout, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in fp32; `stored` is the dtype of numbers of 16 bits."""
    pages, slots = len(page_PX), sizes.slots
    if not pages:  # of no number a shape cannot be inferred
        empty = page_PX.new_empty(0, slots, 1, dtype=torch.float32)
        return empty.expand(-1, -1, sizes.key_width), empty.expand(-1, -1, sizes.value_width)
    key_scales, value_codes, value_scales, _ = sizes.offsets
    if sizes.key_bits == 16:
        key_PCS = _raw(page_PX, 0, sizes.key_kept * slots, stored).view(pages, -1, slots)
    else:
        code_PCS = from_bytes(page_PX[:, :key_scales], sizes.key_kept, slots, sizes.key_bits)
        groups = slots // sizes.key_group
        scale = _halves(page_PX, key_scales, 2 * groups * sizes.key_kept)
        scale_P2CS = scale.view(pages, groups, 2, -1).permute(0, 2, 3, 1)
        scale_P2CS = scale_P2CS.repeat_interleave(sizes.key_group, 3)
        key_PCS = code_PCS.float() * scale_P2CS[:, 0] + scale_P2CS[:, 1]
    if sizes.value_bits == 16:
        value_PSU = _raw(page_PX, value_codes, slots * sizes.value_kept, stored)
        value_PSU = value_PSU.view(pages, slots, -1)
    else:
        data = page_PX[:, value_codes:value_scales]
        code_PSU = from_bytes(data, slots, sizes.value_kept, sizes.value_bits)
        scale = _halves(page_PX, value_scales, 2 * sizes.value_groups * slots)
        group_U = torch.arange(sizes.value_kept, device=page_PX.device) // sizes.value_group
        scale_P2SU = scale.view(pages, 2, -1, slots)[:, :, group_U].mT
        value_PSU = code_PSU.float() * scale_P2SU[:, 0] + scale_P2SU[:, 1]
    return (
        _spread(key_PCS.mT, channel_PC, sizes.key_width),
        _spread(value_PSU, channel_PU, sizes.value_width),
    )


def _raw(page_PX: Tensor, offset: int, count: int, stored: torch.dtype) -> Tensor:
    """Numbers that were not quantised, as fp32."""
    return page_PX[:, offset : offset + count * stored.itemsize].contiguous().view(stored).float()


def _halves(page_PX: Tensor, offset: int, count: int) -> Tensor:
    return page_PX[:, offset : offset + 2 * count].contiguous().view(torch.float16).float()


def _spread(x_PSt: Tensor, channel_Pt: Tensor, width: int) -> Tensor:
    """All channels, zeros where they were dropped, sums where they have two codes."""
    pages, slots, _ = x_PSt.shape
    full_PSd = x_PSt.new_zeros(pages, slots, width)
    index_PSt = channel_Pt.long()[:, None].expand(x_PSt.shape)
    return full_PSd.scatter_add_(2, index_PSt, x_PSt)


def check(operands: Operands, op: str = "unpack") -> PageLayout:
    """The layout. Raises OperatorError for tensors that do not fit it."""
    page_PX, channel_PC, channel_PU, layout, like = operands
    sizes = checked(op, layout)
    channels = {"channel_PC": channel_PC, "channel_PU": channel_PU}
    lengths = shapes.bind(op, {"page_PX": page_PX, **channels})
    shapes.dense(op, {"like": like})
    shapes.floating(op, {"like": like})
    shapes.of_dtype(op, torch.uint8, {"page_PX": page_PX})
    shapes.of_dtype(op, torch.int16, channels)
    given = [lengths[letter] for letter in "XCU"]
    wanted = [sizes.page_bytes, sizes.key_kept, sizes.value_kept]
    if given != wanted or like.element_size() != sizes.item_bytes:
        shapes.refuse(op, f"page_PX and channels have X, C, U = {given}, not {wanted} of {sizes}")
    check_packed(op, page_PX, sizes)
    check_channels(op, channel_PC, sizes.key_width)
    check_channels(op, channel_PU, sizes.value_width)
    return sizes


def check_packed(op: str, page_PX: Tensor, sizes: PageLayout) -> None:
    """Raises OperatorError for pages whose numbers do not begin at multiples of their size."""
    if page_PX.data_ptr() % sizes.item_bytes:
        shapes.refuse(op, f"pages begin between numbers of {sizes.item_bytes} bytes; copy them")
