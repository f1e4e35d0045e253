"""How much of a text each row keeps, by the fraction that all rows together keep.

Of every fraction f the best slots of all layers and heads are taken together; the share of a row is
how much of its tokens is among them. The mean share of all rows is f, and no row keeps less of a
larger fraction.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # what is known of a curve


def curves(score_LHT: Tensor) -> Tensor:
    """The shares of every row at `FRACTIONS`, by the scores of the tokens of one text.

    fp64 `[L, H, X]`. Ties go to the lower layer, head and token.
    """
    order = score_LHT.flatten().argsort(descending=True, stable=True)
    shares = []
    for fraction in FRACTIONS:
        kept = torch.zeros(len(order), dtype=torch.float64, device=order.device)
        kept[order[: round(fraction * len(order))]] = 1
        shares.append(kept.view(score_LHT.shape).mean(-1))
    return torch.stack(shares, dim=-1)


def at(share_LHX: Tensor, fraction: float) -> Tensor:
    """The shares at a fraction from 0 to 1, on straight lines between those known: fp64 `[L, H]`.

    The lines begin with nothing at 0 and end with everything at 1, so that the mean share is the
    fraction.
    """
    share_LHX = share_LHX.double()
    ends = [torch.zeros_like(share_LHX[..., :1]), torch.ones_like(share_LHX[..., :1])]
    whole_LHX, known = torch.cat((ends[0], share_LHX, ends[1]), dim=-1), (0.0, *FRACTIONS, 1.0)
    right = min(bisect_right(known, fraction), len(known) - 1)
    part = (fraction - known[right - 1]) / (known[right] - known[right - 1])
    before_LH, after_LH = whole_LHX[..., right - 1], whole_LHX[..., right]
    return before_LH + part * (after_LH - before_LH)
