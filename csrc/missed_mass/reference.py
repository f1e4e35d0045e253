"""PyTorch reference of `missed_mass`."""

from __future__ import annotations

import math

import torch
from kvpress.csrc.missed_mass import Operands
from kvpress.csrc.score_pages.reference import check_table
from torch import Tensor

from kvpress.ops import shapes
from kvpress.ops.operands import Places

_UNIT = 2.0**-24  # by which a product and a sum in fp32 are wrong, relatively, at most
ROUNDED = 2.0**-20  # by which what follows the products is wrong, relatively, at most
MOST = torch.finfo(torch.float32).max


def missed_mass(operands: Operands) -> tuple[Tensor, Tensor]:
    """For every query a bound of ln Σ exp(logit) over the slots of pages that are not read.

    −∞ where all are read; never no number, and never ∞: a logit is at most the largest number. With
    it the longest value of such a page: 0 where all are read. Raises OperatorError.
    """
    query_BND, bound_BNW, (table_RW, pages_R), chosen, length_P2, logits, slots = operands
    check(operands)
    scaling, softcap = logits
    (batch, heads, width), (rows, places) = query_BND.shape, table_RW.shape
    missed_RW = missed(pages_R, chosen)
    if not places:
        return length_P2.new_full((batch, heads), -torch.inf), length_P2.new_zeros(rows)
    page_RW = table_RW.long().where(missed_RW, 0)
    length_RW2 = length_P2[page_RW] if missed_RW.any() else length_P2.new_zeros(rows, places, 2)
    error, extra = slack(width, places, slots)
    norm_RG1 = query_BND.float().norm(dim=2).view(rows, -1, 1)
    bound_RGW = bound_BNW.view(rows, -1, places)
    logit_RGW = (bound_RGW + error * norm_RG1 * length_RW2[:, None, :, 0]) * scaling
    if softcap:
        logit_RGW = torch.tanh(logit_RGW / softcap) * softcap
    logit_RGW = logit_RGW + logit_RGW.abs() * ROUNDED
    logit_RGW = logit_RGW.where(logit_RGW <= MOST, MOST)  # neither infinite nor no number
    logit_RGW = logit_RGW.masked_fill(~missed_RW[:, None], -torch.inf)
    longest_R = length_RW2[..., 1].where(missed_RW, 0).amax(1)
    return logit_RGW.logsumexp(2).view(batch, heads) + extra, longest_R


def missed(pages_R: Tensor, chosen: Places) -> Tensor:
    """Which pages of rows are not read: bool `[R, W]`."""
    place_RW, chosen_R = chosen
    place_W = torch.arange(place_RW.shape[1], device=place_RW.device)
    missed_RW = place_W < pages_R[:, None]
    row_A, entry_A = (place_W < chosen_R[:, None]).nonzero().unbind(1)
    missed_RW[row_A, place_RW[row_A, entry_A].long()] = False
    return missed_RW


def slack(width: int, places: int, slots: int) -> tuple[float, float]:
    """What rounding may take: of a product relative to both lengths, and of a mass with ln slots.

    A sum of D products in any order is wrong by D·2⁻²⁴ of the sum of their sizes, and a little,
    which Cauchy-Schwarz bounds; as much again is for the norm of the query.
    """
    error = 2 * width * _UNIT
    return error / (1 - error), math.log(slots) + 2.0**-14 + places * _UNIT


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op, (scaling, softcap) = "missed_mass", operands.logits
    length_P2, rows, places = operands.length_P2, operands.rows, operands.places
    named = {"query_BND": operands.query_BND, "bound_BNW": operands.bound_BNW}
    of_rows = {**rows._asdict(), **places._asdict()}
    lengths = shapes.bind(op, {**named, **of_rows, "length_PX": length_P2})
    shapes.floating(op, {"query_BND": operands.query_BND})
    shapes.of_dtype(op, operands.query_BND.dtype, {"query_BND": operands.query_BND})
    shapes.of_dtype(op, torch.float32, {"bound_BNW": operands.bound_BNW, "length_P2": length_P2})
    shapes.of_dtype(op, torch.int32, {n: of_rows[n] for n in ("table_RW", "place_RW")})
    shapes.of_dtype(op, torch.int64, {n: of_rows[n] for n in ("pages_R", "chosen_R")})
    if lengths["X"] != 2:
        shapes.refuse(op, f"length_P2 has {lengths['X']} lengths; a page has 2")
    shapes.at_least_one(op, lengths, "BNRD")
    shapes.at_most(op, lengths, "D", shapes.MOST_CODED)
    shapes.logits(op, scaling, softcap)
    if not scaling > 0:
        shapes.refuse(op, f"scaling is {scaling}; bounds of products are bounds of logits above 0")
    if not 1 <= operands.slots <= shapes.MOST_SLOTS:
        shapes.refuse(op, f"slots is {operands.slots}; 1 to {shapes.MOST_SLOTS} are allowed")
    if lengths["R"] % lengths["B"] or lengths["N"] % (lengths["R"] // lengths["B"]):
        shapes.refuse(
            op,
            f"{lengths['N']} query heads of {lengths['B']} sequences do not share {lengths['R']}"
            " rows",
        )
    check_table(op, *rows, lengths["P"])
    check_table(op, *places, lengths["W"])
