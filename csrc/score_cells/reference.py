"""PyTorch reference of `score_cells`."""

from __future__ import annotations

import torch
from kvpress.csrc.missed_mass.reference import missed
from kvpress.csrc.score_cells import Operands
from kvpress.csrc.score_pages.reference import check as check_pages
from kvpress.csrc.score_pages.reference import check_table
from torch import Tensor

from kvpress.formulas.page_cells import BITS, PAGE, cell_bytes, from_cells
from kvpress.ops import shapes

LEAST = 2.0**-100  # of a channel, so that the slack also covers cells too small to be told apart
SMALL = 2.0**-140  # of a channel: products may be smaller than any normal number
_UNIT = 2.0**-24  # by which a product and a sum in fp32 are wrong, relatively, at most


def score_cells(operands: Operands) -> tuple[Tensor, Tensor]:
    """Bounds fp32 `[B, N, W]`: of the named places, −∞ elsewhere; then those of all places.

    A bound is the least of the given one and Σ_d of the larger product of q_d with an end of the
    cell of the key, of that key for which it is largest. No key gives a larger product, up to what
    `missed_mass` adds. Raises OperatorError.
    """
    query_BND, box_P2D, cell_PY, (table_RW, pages_R), named, bound_BNW, bits, slots = operands
    check(operands)
    rows, places = table_RW.shape
    width, apart_RW = query_BND.shape[2], missed(pages_R, named)
    named_RW = (torch.arange(places, device=table_RW.device) < pages_R[:, None]) & ~apart_RW
    rank_BNW = torch.full_like(bound_BNW, -torch.inf)
    row_A, place_A = named_RW.nonzero().unbind(1)
    if not len(row_A):
        return rank_BNW, bound_BNW.clone()
    page_A = table_RW[row_A, place_A].long()
    code_ADS = from_cells(cell_PY[page_A], width, slots, bits).float().mT
    low_AD, high_AD = box_P2D[page_A].float().unbind(1)
    query_AGD = query_BND.float().view(rows, -1, width)[row_A]
    part_AGD = query_AGD * ((high_AD - low_AD) * 2.0**-bits)[:, None]
    least_AG = (query_AGD * low_AD[:, None] + part_AGD.clamp_min(0)).sum(2)
    size_AD = torch.maximum(low_AD.abs(), high_AD.abs()) + (high_AD - low_AD) + LEAST
    least_AG = least_AG + slack(width) * query_AGD.abs().amax(2) * size_AD.sum(1, keepdim=True)
    least_AG = least_AG + width * SMALL
    fine_AG = least_AG + (part_AGD @ code_ADS).amax(2)
    fine_AG = fine_AG.masked_fill(fine_AG.isnan(), torch.inf)
    bound_RGW = bound_BNW.reshape(rows, -1, places).clone()
    rank_RGW = rank_BNW.view(rows, -1, places)
    fine_AG = torch.minimum(fine_AG, bound_RGW[row_A, :, place_A])
    rank_RGW[row_A, :, place_A] = bound_RGW[row_A, :, place_A] = fine_AG
    return rank_BNW, bound_RGW.view_as(bound_BNW)


def slack(width: int) -> float:
    """What rounding may take of a bound, relative to the largest factor and the sum of sizes."""
    return 4 * width * _UNIT


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op = "score_cells"
    query_BND, box_P2D, cell_PY, rows, (place_RW, chosen_R), bound_BNW = operands[:6]
    check_pages((query_BND, box_P2D, rows), op)
    named = {"bound_BNW": bound_BNW, "place_RW": place_RW, "chosen_R": chosen_R}
    pages = {"table_RW": rows.table_RW, "query_BND": query_BND, "cell_PY": cell_PY}
    lengths = shapes.bind(op, {**named, **pages, "box_PXD": box_P2D})
    shapes.of_dtype(op, torch.float32, {"bound_BNW": bound_BNW})
    shapes.of_dtype(op, torch.uint8, {"cell_PY": cell_PY})
    shapes.of_dtype(op, torch.int32, {"place_RW": place_RW})
    shapes.of_dtype(op, torch.int64, {"chosen_R": chosen_R})
    if operands.bits not in BITS:
        shapes.refuse(op, f"bits is {operands.bits}; {BITS} are allowed")
    if not 1 <= operands.slots <= shapes.MOST_SLOTS or operands.slots % PAGE:
        shapes.refuse(op, f"slots is {operands.slots}; multiples of {PAGE} are allowed")
    wanted = cell_bytes(lengths["D"], operands.slots, operands.bits)
    if lengths["Y"] != wanted:
        shapes.refuse(op, f"cell_PY has {lengths['Y']} bytes for each page, not {wanted}")
    check_table(op, place_RW, chosen_R, lengths["W"])
