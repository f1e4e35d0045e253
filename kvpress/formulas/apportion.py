"""Sharing a number of places among rows: by weights within bounds, or by the scores of slots."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 80  # of the interval in which a factor lies: beyond the last bit


def apportion(weight_X: Tensor, total: int, low_X: Tensor, high_X: Tensor) -> Tensor:
    """Whole numbers near `clamp(c · weight, low, high)`, whose sum is exactly `total`: int64 `[X]`.

    c is the factor for which the clamped weights have that sum; what rounding leaves goes to the
    largest remainders, ties to the first. weight_X: above 0. low_X, high_X: whole numbers, low <=
    high. A total below the sum of `low` gives `low`, one above that of `high` gives `high`.
    """
    low_X, high_X = low_X.double(), high_X.double()
    if total <= low_X.sum():
        return low_X.long()
    if total >= high_X.sum():
        return high_X.long()
    share_X = _scaled(weight_X.double(), total, low_X, high_X)
    count_X = (share_X + 1e-9).floor().maximum(low_X)
    rest = total - int(count_X.sum())
    remainder_X = (share_X - count_X).masked_fill(count_X >= high_X, -torch.inf)
    order_X = remainder_X.argsort(descending=True, stable=True)
    count_X[order_X[:rest]] += 1
    return count_X.long()


def _scaled(weight_X: Tensor, total: int, low_X: Tensor, high_X: Tensor) -> Tensor:
    """`clamp(c · weight, low, high)` with the sum `total`, which is between those of the bounds."""
    plain_X = weight_X * (total / weight_X.sum())
    if bool(((plain_X >= low_X) & (plain_X <= high_X)).all()):
        return plain_X
    low, high = 0.0, float((high_X / weight_X).max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sums = float((middle * weight_X).clamp(low_X, high_X).sum())
        low, high = (low, middle) if sums > total else (middle, high)
    return (low * weight_X).clamp(low_X, high_X)


def by_score(score_XS: Tensor, open_XS: Tensor, places: int, own_X: Tensor) -> Tensor:
    """How many of `places` open slots each row gets when all rows compete: int64 `[X]`.

    A row keeps its own best `own_X` slots; the other places go to the largest scores of all rows.
    Ties go to the lower row, then to the lower slot. score_XS: of slots, those of a row in the
    order of their positions. open_XS: which of them compete.
    """
    held_X = open_XS.sum(-1)
    if places >= int(held_X.sum()):
        return held_X
    own_X = own_X.minimum(held_X)
    score_XS = score_XS.float().masked_fill(~open_XS, -torch.inf)
    if bool((own_X > 0).any()):
        order_XS = score_XS.argsort(dim=-1, descending=True, stable=True)
        place_S = torch.arange(score_XS.shape[1], device=score_XS.device)
        best_XS = torch.zeros_like(open_XS).scatter_(-1, order_XS, place_S < own_X[:, None])
        open_XS = open_XS & ~best_XS
    rest = places - int(own_X.sum())
    return own_X if rest <= 0 else own_X + _won(score_XS, open_XS, rest)


def _won(score_XS: Tensor, open_XS: Tensor, places: int) -> Tensor:
    """Which rows the `places` largest scores among open slots are of: a count for each."""
    level = score_XS[open_XS].topk(places).values[-1]  # the last score that gets a place
    above_X = (open_XS & (score_XS > level)).sum(-1)
    tied_X = (open_XS & (score_XS == level)).sum(-1)
    before_X = tied_X.cumsum(0) - tied_X  # ties of lower rows
    rest = places - above_X.sum()
    return above_X + (rest - before_X).clamp_min(0).minimum(tied_X)
