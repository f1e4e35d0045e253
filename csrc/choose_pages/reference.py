"""PyTorch reference of `choose_pages`."""

from __future__ import annotations

import torch
from kvpress.csrc.choose_pages import Operands
from kvpress.csrc.score_pages.reference import check_table
from torch import Tensor

from kvpress.ops import shapes


def choose_pages(operands: Operands) -> tuple[Tensor, Tensor]:
    """The places of the pages to read, ascending, then −1: int32 `[R, W]`; how many: int64 `[R]`.

    A page ranks by the largest bound of the query heads of its row, each relative to the best of
    that head: so the best page of every head is read where as many may be. Of equal ones the first
    is better. A bound that is no number is ∞. Raises OperatorError.
    """
    bound_BNW, (table_RW, pages_R), (span_P2, sink_R, from_R), keep_R = operands
    check(operands)
    place_W = torch.arange(table_RW.shape[1], device=table_RW.device)
    held_RW = place_W < pages_R[:, None]
    rank_RW = ranks(bound_BNW, held_RW)
    span_RW2 = span_P2[table_RW.long().where(held_RW, 0)] if held_RW.any() else None
    if span_RW2 is None:
        return torch.full_like(table_RW, -1), torch.zeros_like(pages_R)
    always_RW = (span_RW2[..., 0] < sink_R[:, None]) | (span_RW2[..., 1] >= from_R[:, None])
    rank_RW = rank_RW.masked_fill(always_RW & held_RW, torch.inf)
    order_RW = rank_RW.masked_fill(~held_RW, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    chosen_R = torch.minimum(torch.maximum((always_RW & held_RW).sum(1), keep_R), pages_R)
    first_RW = place_W < chosen_R[:, None]
    end = table_RW.shape[1]
    place_RW = order_RW.where(first_RW, end).sort(dim=1).values
    return place_RW.where(place_RW < end, -1).int(), chosen_R


def ranks(bound_BNW: Tensor, held_RW: Tensor) -> Tensor:
    """By what pages rank: the largest bound relative to the best of its query head, `[R, W]`.

    0 for the best of every head; −∞ for what is not held.
    """
    rows, places = held_RW.shape
    bound_RGW = bound_BNW.reshape(rows, -1, places) if places else bound_BNW.new_zeros(rows, 1, 0)
    bound_RGW = bound_RGW.masked_fill(bound_RGW.isnan(), torch.inf)
    bound_RGW = bound_RGW.masked_fill(~held_RW[:, None], -torch.inf)
    best_RG1 = bound_RGW.amax(2, keepdim=True) if places else bound_RGW.new_zeros(rows, 1, 1)
    rank_RGW = (bound_RGW - best_RG1).masked_fill(bound_RGW == best_RG1, 0)  # also of infinite ones
    return rank_RGW.amax(1).masked_fill(~held_RW, -torch.inf)


def check(operands: Operands) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op, (bound_BNW, rows, always, keep_R) = "choose_pages", operands
    (table_RW, pages_R), (span_P2, sink_R, from_R) = rows, always
    wide = {"pages_R": pages_R, "sink_R": sink_R, "from_R": from_R, "keep_R": keep_R}
    named = {"bound_BNW": bound_BNW, "table_RW": table_RW, **wide}
    lengths = shapes.bind(op, {**named, "span_PX": span_P2})
    shapes.of_dtype(op, torch.float32, {"bound_BNW": bound_BNW})
    shapes.of_dtype(op, torch.int32, {"table_RW": table_RW, "span_P2": span_P2})
    shapes.of_dtype(op, torch.int64, wide)
    if lengths["X"] != 2:
        shapes.refuse(op, f"span_P2 has {lengths['X']} ends; a span has 2")
    shapes.at_least_one(op, lengths, "BNR")
    if lengths["R"] % lengths["B"] or lengths["N"] % (lengths["R"] // lengths["B"]):
        shapes.refuse(
            op,
            f"{lengths['N']} query heads of {lengths['B']} sequences do not share {lengths['R']}"
            " rows",
        )
    check_table(op, *rows, lengths["P"])
