"""Block-sparse prompt attention by 4-bit estimation (SALE, Ji et al., arXiv 2505.24179).

1. Queries and keys, less their means, are quantised to codes −7 … 7.
2. Exact logits over the first 32 slots and a local area give each query m and l; a block of 64
   queries × 32 keys is computed if some estimate has exp(s − m) / l > τ: its relative attention
   score (eq. 3; the printed eq. 4 has a misplaced parenthesis).
3. Attention over those blocks alone. Keys and values are stored as they came.

τ is calibrated per layer and query head: it is halved until the output of the head moves by less
than a bound, and 0 means dense.

Differs from the paper: τ begins at 0.064 (paper: 0.008), with a relative bound. As in its code,
queries lose their mean too, which is given back in fp32, and a score must be above τ (paper: at
least τ). Keys are indexed by KV head, never repeated; batches, chunks and any head size work.
Prompts below a measured length stay dense (code: 1,024).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Policy, PolicyError, Sparsity, option


@dataclass(frozen=True, kw_only=True)
class SALE(Policy):
    threshold: float | None = option(
        None, "τ of all heads; none: that of each head in the calibration", low=0
    )
    calibration: str | None = option(
        None, "file of `kvpress calibrate sale`; none: the one that ships for the model"
    )
    local: int = option(128, "slots before a query that are always attended (code: 128)", low=0)
    least: int | None = option(
        None, "new tokens below which attention stays dense; none: calibrated", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.calibration is not None:
            raise PolicyError(
                f"threshold={self.threshold} and calibration={self.calibration} exclude each other:"
                " give one threshold for all heads, or a calibration."
            )

    def sparsify(self) -> Sparsity | None:
        return Sparsity(self.threshold, self.calibration, self.local, self.least)
