"""Packing pages of old slots: what may be quantised, and the operator that does it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import CacheError
from kvpress.formulas import boost
from kvpress.formulas.page_layout import PageLayout

_LARGEST = torch.finfo(torch.float16).max  # of a number whose step and zero are fp16


def finite(key_RSD: Tensor, value_RSE: Tensor) -> Tensor:
    """Which rows hold only numbers: bool, on the host. Others stay as they came, and say so."""
    both = (x.isfinite().flatten(1).all(1) for x in (key_RSD, value_RSE))
    return torch.stack(list(both)).all(0).cpu()


def pack(
    layout: PageLayout, key_PSD: Tensor, value_PSE: Tensor, channels: tuple[Tensor, Tensor]
) -> Tensor:
    """Pages of old slots, `[P, bytes]`. channels: the kept ones of every page, int16.

    Raises CacheError for numbers that steps in fp16 cannot reach.
    """
    for name, x, bits in (
        ("keys", key_PSD, layout.key_bits),
        ("values", value_PSE, layout.value_bits),
    ):
        if bits < 16 and x.numel() and not float(x.abs().amax()) <= _LARGEST:
            raise CacheError(
                f"{name.capitalize()} reach {float(x.abs().amax()):.3g}, but quantised ones must be"
                f" finite and at most {_LARGEST:.0f}. Keep {name} at 16 bits."
            )
    if layout.boosted:  # as channels of their own, which pages of these bytes hold as well
        key_PSD, value_PSE = boost.halves(key_PSD, channels[0], layout), value_PSE.float()
        all_T = torch.arange(layout.key_kept, dtype=torch.int16, device=key_PSD.device)
        channels = (all_T.repeat(len(key_PSD), 1), channels[1])
        layout = layout.apart
    return ops.pack(key_PSD.contiguous(), value_PSE.contiguous(), *channels, list(layout))
