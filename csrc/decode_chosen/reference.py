"""PyTorch reference of `decode_chosen`: the references of its parts."""

from __future__ import annotations

from kvpress.csrc.choose_pages.reference import choose_pages
from kvpress.csrc.decode_chosen import Operands
from kvpress.csrc.decode_chosen.compose import Backend, composed
from kvpress.csrc.decode_rows.reference import decode_rows
from kvpress.csrc.missed_mass.reference import missed_mass
from kvpress.csrc.score_cells.reference import score_cells
from kvpress.csrc.score_pages.reference import score_pages
from torch import Tensor


def decode_chosen(operands: Operands) -> tuple[Tensor, ...]:
    """Attention output `[B, N, 1, E]`, what was missed, and which pages were read.

    LSE `[B, N]` of what was read; ln of the exponentials of what was not, at the most `[B, N]`; the
    longest value of those `[R]`; fp32. Places of the pages read, ascending, then −1, the parts side
    by side: int32 `[R, W]`; how many of each part, and how many were judged by cells: int64 `[X,
    R]`. Raises OperatorError.
    """
    return composed(
        operands, Backend(score_pages, choose_pages, score_cells, decode_rows, missed_mass)
    )
