"""PyTorch reference of `score_pages`."""

from __future__ import annotations

import torch
from kvpress.csrc.score_pages import Operands
from torch import Tensor

from kvpress.ops import shapes
from kvpress.ops.operands import RowPages


def score_pages(operands: Operands) -> Tensor:
    """No key of page w of its row gives a query a larger product than `[b, n, w]`: fp32.

    −∞ beyond the pages of a row; ∞ for what would be no number. Raises OperatorError.
    """
    query_BND, box_P2D, (table_RW, pages_R) = operands
    check(operands)
    batch, heads, width = query_BND.shape
    rows = len(pages_R) // batch
    query_BHGD = query_BND.float().view(batch, rows, heads // rows, width)
    place_W = torch.arange(table_RW.shape[1], device=table_RW.device)
    held_RW = place_W < pages_R[:, None]
    page_RW = table_RW.long().where(held_RW, 0)
    bound_BHGW = query_BHGD.new_zeros(batch, rows, heads // rows, table_RW.shape[1])
    if held_RW.any():
        low_RWD, high_RWD = (box_P2D[:, i].float()[page_RW] for i in (0, 1))
        shape = (batch, rows, 1, table_RW.shape[1], width)
        # The same products and the same sum for every page: rounding cannot change an order.
        query_BHG1D = query_BHGD[:, :, :, None]
        end_BHGWD = torch.where(query_BHG1D < 0, low_RWD.view(shape), high_RWD.view(shape))
        bound_BHGW = (query_BHG1D * end_BHGWD).sum(-1)
        bound_BHGW = bound_BHGW.masked_fill(bound_BHGW.isnan(), torch.inf)
    held_BH1W = held_RW.view(batch, rows, 1, -1)
    return bound_BHGW.masked_fill(~held_BH1W, -torch.inf).flatten(1, 2)


def check(operands: tuple[Tensor, Tensor, RowPages], op: str = "score_pages") -> None:
    """Raises OperatorError for tensors that do not fit together."""
    query_BND, box_P2D, (table_RW, pages_R) = operands
    named = {"query_BND": query_BND, "table_RW": table_RW, "pages_R": pages_R}
    lengths = shapes.bind(op, {**named, "box_PXD": box_P2D})
    shapes.floating(op, {"query_BND": query_BND, "box_P2D": box_P2D})
    shapes.of_dtype(op, box_P2D.dtype, {"box_P2D": box_P2D})
    shapes.of_dtype(op, query_BND.dtype, {"query_BND": query_BND})
    shapes.of_dtype(op, torch.int32, {"table_RW": table_RW})
    shapes.of_dtype(op, torch.int64, {"pages_R": pages_R})
    if lengths["X"] != 2:
        shapes.refuse(op, f"box_P2D has {lengths['X']} ends; a box has 2")
    shapes.at_least_one(op, lengths, "BND")
    shapes.at_most(op, lengths, "D", shapes.MOST_CODED)
    if (
        lengths["R"] % lengths["B"]
        or not lengths["R"]
        or lengths["N"] % (lengths["R"] // lengths["B"])
    ):
        shapes.refuse(
            op,
            f"{lengths['N']} query heads of {lengths['B']} sequences do not share {lengths['R']}"
            " rows",
        )
    check_table(op, table_RW, pages_R, lengths["P"])


def check_table(op: str, table_RW: Tensor, pages_R: Tensor, pages: int) -> None:
    """Raises OperatorError for a table that names pages that are not there. Only on the CPU."""
    if table_RW.device.type != "cpu" or not len(pages_R):
        return
    if bool(((pages_R < 0) | (pages_R > table_RW.shape[1])).any()):
        shapes.refuse(op, f"rows have {pages_R.tolist()} pages; the table has {table_RW.shape[1]}")
    held_RW = torch.arange(table_RW.shape[1], device="cpu") < pages_R[:, None]
    named_A = table_RW[held_RW]
    if named_A.numel() and bool(((named_A < 0) | (named_A >= pages)).any()):
        shapes.refuse(op, f"table_RW names pages that are not among {pages}")
