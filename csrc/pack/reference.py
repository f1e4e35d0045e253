"""PyTorch reference of `pack`; what codes and scales are is decided here."""

from __future__ import annotations

import torch
from kvpress.csrc.pack import Operands
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout, checked, to_bytes
from kvpress.ops import shapes


def pack(operands: Operands) -> Tensor:
    """Pages uint8 `[P, bytes]` of S slots each. Raises OperatorError.

    channel_PC, channel_PU: the kept channels of keys and values, int16, ascending.
    """
    key_PSD, value_PSE, channel_PC, channel_PU, _ = operands
    sizes = check(operands)
    if not len(key_PSD):
        return key_PSD.new_empty((0, sizes.page_bytes), dtype=torch.uint8)
    key_PCS = key_PSD.gather(2, _over_slots(channel_PC, sizes.slots)).mT
    value_PSU = value_PSE.gather(2, _over_slots(channel_PU, sizes.slots))
    page_PX = key_PSD.new_zeros((len(key_PSD), sizes.page_bytes), dtype=torch.uint8)
    key_scales, value_codes, value_scales, _ = sizes.offsets
    if sizes.key_bits == 16:
        _put(page_PX, 0, key_PCS)
    else:
        key_PCgs = torch.unflatten(key_PCS, 2, (-1, sizes.key_group))
        code_PCgs, step_PCg, zero_PCg = quantise(key_PCgs, sizes.key_bits)
        _put(page_PX, 0, to_bytes(code_PCgs.flatten(2), sizes.key_bits))
        _put(page_PX, key_scales, torch.stack([step_PCg.mT, zero_PCg.mT], 2))
    if sizes.value_bits == 16:
        _put(page_PX, value_codes, value_PSU)
        return page_PX
    codes, scales = [], []
    for value_PSg in torch.split(value_PSU, sizes.value_group, dim=2):
        code_PSg, *scale = quantise(value_PSg, sizes.value_bits)
        codes.append(code_PSg)
        scales.append(torch.stack(scale, 1))
    _put(page_PX, value_codes, to_bytes(torch.cat(codes, 2), sizes.value_bits))
    _put(page_PX, value_scales, torch.stack(scales, 2))
    return page_PX


def quantise(x_Xn: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), steps and zeros (fp16) of groups of n numbers.

    zero is the largest fp16 number that is not above the least x, step the least one with which the
    codes reach the largest x: |x − (step · code + zero)| ≤ step / 2. Codes round half to even.
    """
    x_Xn = x_Xn.float()
    low_X, high_X = x_Xn.aminmax(dim=-1)
    zero_X = _next(low_X.half(), low_X, -1)
    exact_X = (high_X - zero_X.float()) / (2**bits - 1)
    step_X = _next(exact_X.half(), exact_X, 1)
    divisor_X = step_X.float().masked_fill(step_X == 0, 1.0)
    code_Xn = ((x_Xn - zero_X.float()[..., None]) / divisor_X[..., None]).round()
    return code_Xn.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8), step_X, zero_X


def _next(half_X: Tensor, exact_X: Tensor, sign: int) -> Tensor:
    """`half_X`, or the next fp16 number in the direction of `sign` where it lies short of x."""
    bits_X = half_X.view(torch.int16).int()
    order_X = torch.where(bits_X < 0, -(bits_X & 0x7FFF), bits_X)  # in the order of the numbers
    short_X = (half_X.float() - exact_X) * sign < 0
    order_X = order_X + sign * short_X.int()
    bits_X = torch.where(order_X < 0, -order_X | 0x8000, order_X)
    return torch.where(short_X, bits_X.to(torch.int16).view(torch.float16), half_X)


def _put(page_PX: Tensor, offset: int, numbers: Tensor) -> None:
    data_PX = numbers.contiguous().flatten(1).view(torch.uint8)
    page_PX[:, offset : offset + data_PX.shape[1]] = data_PX


def _over_slots(channel_PC: Tensor, slots: int) -> Tensor:
    return channel_PC.long()[:, None].expand(-1, slots, -1)


def check(operands: Operands) -> PageLayout:
    """The layout. Raises OperatorError for tensors that do not fit it."""
    key_PSD, value_PSE, channel_PC, channel_PU, layout = operands
    op, sizes = "pack", checked("pack", layout)
    floats = {"key_PSD": key_PSD, "value_PSE": value_PSE}
    channels = {"channel_PC": channel_PC, "channel_PU": channel_PU}
    lengths = shapes.bind(op, {**floats, **channels})
    shapes.floating(op, floats)
    shapes.of_dtype(op, key_PSD.dtype, floats)
    shapes.of_dtype(op, torch.int16, channels)
    given = [lengths[letter] for letter in "SDECU"]
    if given != list(sizes[:5]) or key_PSD.element_size() != sizes.item_bytes:
        shapes.refuse(op, f"key_PSD, value_PSE and channels have S, D, E, C, U = {given}, {sizes}")
    if sizes.boosted:
        shapes.refuse(
            op, f"{sizes}: the two codes of a channel are packed as channels of their own"
        )
    check_channels(op, channel_PC, sizes.key_width)
    check_channels(op, channel_PU, sizes.value_width)
    return sizes


def check_channels(op: str, channel_RC: Tensor, width: int, counts_R: Tensor | None = None) -> None:
    """Raises OperatorError for kept channels that do not exist or do not ascend. On the CPU.

    Those of rows without slots may be any that exist.
    """
    if channel_RC.device.type != "cpu" or not channel_RC.numel():
        return
    if int(channel_RC.min()) < 0 or int(channel_RC.max()) >= width:
        bad = channel_RC[(channel_RC < 0) | (channel_RC >= width)][0]
        shapes.refuse(op, f"channel {int(bad)} of {width}; 0 to {width - 1} exist")
    runs = (channel_RC[:, :width], channel_RC[:, width:])  # all, then those that have two codes
    falls_R = torch.stack([(run_RC.diff(dim=1) <= 0).any(1) for run_RC in runs]).any(0)
    if counts_R is not None:
        falls_R &= counts_R > 0
    if bool(falls_R.any()):
        shapes.refuse(op, f"channels {channel_RC[falls_R][0].tolist()} of a row must ascend")
