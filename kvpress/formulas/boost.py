"""Key channels with twice the bits, as two channels of codes (after Kitty, arXiv 2511.18643).

A code of 2b bits is 2^b · hi + lo. Both halves are channels of b bits: one stands for
`zero + 2^b · step · hi`, the other one for `step · lo`, and a query's number is multiplied by both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout


def sensitive(
    query_BNQD: Tensor, key_BHSD: Tensor, held_BHS: Tensor, group: int, bits: int, count: int
) -> Tensor:
    """The channels of each row whose codes cost most: int64 `[B, H, count]`, ascending.

    mean q_c² · mean step_c²: up to 1/12 the squared error of a logit that channel c makes. Steps
    are of `group` neighbouring slots.
    """
    batch, heads, slots, width = key_BHSD.shape
    query_BHXD = query_BNQD.float().reshape(batch, heads, -1, width)
    missing = -slots % group
    key_BHSD = torch.nn.functional.pad(key_BHSD.float(), (0, 0, 0, missing))
    held_BHS1 = torch.nn.functional.pad(held_BHS, (0, missing))[..., None]
    sizes = (batch, heads, -1, group, width)
    low_BHgD = key_BHSD.masked_fill(~held_BHS1, torch.inf).view(sizes).amin(3)
    high_BHgD = key_BHSD.masked_fill(~held_BHS1, -torch.inf).view(sizes).amax(3)
    step_BHgD = ((high_BHgD - low_BHgD) / (2**bits - 1)).clamp_min(0.0).nan_to_num(0.0, 0.0)
    cost_BHD = query_BHXD.square().mean(2) * step_BHgD.square().mean(2)
    channel_BHC: Tensor = cost_BHD.topk(count, dim=-1).indices.sort(-1).values
    return channel_BHC


def halves(key_PSD: Tensor, channel_PC: Tensor, layout: PageLayout) -> Tensor:
    """Keys with the high halves of boosted channels, and their low ones behind: fp32 `[P, S, T]`.

    channel_PC: all D channels, then the boosted ones. Zero and step of the high halves are numbers
    of fp16, as they are stored: what they leave over is in the low halves.
    """
    pages, slots, width = key_PSD.shape
    boosted_PSB = channel_PC[:, width:].long()[:, None].expand(-1, slots, -1)
    key_PSD = key_PSD.float()
    x_PgsB = key_PSD.gather(2, boosted_PSB).view(pages, -1, layout.key_group, boosted_PSB.shape[2])
    low_Pg1B, high_Pg1B = x_PgsB.amin(2, keepdim=True), x_PgsB.amax(2, keepdim=True)
    levels = 2**layout.key_bits
    low_Pg1B = _half(low_Pg1B, -1)
    coarse_Pg1B = _half((high_Pg1B - low_Pg1B) * levels / (levels**2 - 1), 1)
    step_Pg1B = coarse_Pg1B / levels
    code_PgsB = ((x_PgsB - low_Pg1B) / step_Pg1B.where(step_Pg1B > 0, 1.0)).round()
    code_PgsB = code_PgsB.clamp(0, levels**2 - 1)
    high_PgsB = (code_PgsB / levels).floor()
    # A little less, so that the step that reaches the largest of them is not the next number.
    own_PSB = (low_Pg1B + coarse_Pg1B * (1 - 2**-20) * high_PgsB).view_as(boosted_PSB)
    more_PSB = (step_Pg1B * (code_PgsB - levels * high_PgsB)).view_as(boosted_PSB)
    return torch.cat([key_PSD.scatter(2, boosted_PSB, own_PSB), more_PSB], dim=2)


def _half(x: Tensor, sign: int) -> Tensor:
    """The nearest number of fp16 that is not above x, or with sign 1 not below it, in fp32."""
    near = x.half()
    beyond = torch.nextafter(near, near.new_full((), sign * torch.inf))
    return torch.where((near.float() - x) * sign < 0, beyond, near).float()
