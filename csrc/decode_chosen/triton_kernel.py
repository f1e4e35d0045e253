"""Triton's `decode_chosen`: the kernels of its parts."""

from __future__ import annotations

from kvpress.csrc.choose_pages.triton_kernel import choose_pages
from kvpress.csrc.decode_chosen import Operands
from kvpress.csrc.decode_chosen.compose import Backend, composed
from kvpress.csrc.decode_rows.triton_kernel import decode_rows
from kvpress.csrc.missed_mass.triton_kernel import missed_mass
from kvpress.csrc.score_cells.triton_kernel import score_cells
from kvpress.csrc.score_pages.triton_kernel import score_pages
from torch import Tensor


def decode_chosen(operands: Operands) -> tuple[Tensor, ...]:
    """The same as the reference, with other orders of sums. Raises OperatorError."""
    return composed(
        operands, Backend(score_pages, choose_pages, score_cells, decode_rows, missed_mass)
    )
