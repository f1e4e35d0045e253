"""Block-sparse attention of a prompt: quantise, estimate which blocks matter, compute those.

Source: arXiv 2505.24179. Queries and keys are smoothed by their means and quantised to 4 bits; a
block is computed if one of its estimated logits exceeds ln τ + LSE, where the LSE is exact, over
the first block and the local area of the query.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sparsity(NamedTuple):
    """How a policy wants a prompt's attention to be made sparse.

    threshold: relative attention score τ above which a block is computed, of all heads; None: that
    of every head in a calibration. calibration: its file; None: one that ships for the model.
    local: slots before a query block that are always computed, at least. least: new tokens below
    which attention stays dense; None: calibrated.
    """

    threshold: float | None
    calibration: str | None
    local: int
    least: int | None


class Thresholds(NamedTuple):
    """What a `Sparsity` comes to for one model: τ of layer and query head, 0 for a dense head."""

    tau_LN: Tensor  # fp32, on the host
    local: int
    least: int
